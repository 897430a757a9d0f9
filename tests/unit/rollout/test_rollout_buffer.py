"""Admission, staleness, filters and use of prompts in the buffer between sampler and policy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from grpo_mega.rollout.carried_rollouts import CarriedRollouts, OpenGroup, PromptShard
from grpo_mega.rollout.rollout_buffer import BufferLimits, RolloutBuffer
from grpo_mega.rollout.staleness import StalenessLimit
from grpo_mega.types import Completion, Prompt, Reward, Rollout

QUOTA, SIZE, UPDATES = 3, 2, 2
LIMITS = BufferLimits(QUOTA, SIZE, StalenessLimit(4, UPDATES))


def prompt_of(number: int) -> Prompt:
    return Prompt(number, "", (1,), "")


def has_no_signal(rollouts: Sequence[Rollout]) -> bool:
    return len({rollout.reward.value for rollout in rollouts}) == 1


def buffer_of(limits: BufferLimits = LIMITS, carried: CarriedRollouts | None = None) -> RolloutBuffer:
    shard = PromptShard(0, 1, limits.quota)
    return RolloutBuffer(carried or CarriedRollouts.after_step(0, shard), limits, prompt_of, has_no_signal)


def sample(group: OpenGroup, version: int, *, is_done: bool = True) -> OpenGroup:
    """Return the group with one more token of each open rollout."""
    found = group.copy()
    for rollout in found.rollouts:
        rollout.add_sampled(Completion([7], [-1.0], "eos", version, "7"))
        rollout.is_done = is_done
    return found


def scored(group: OpenGroup, rewards: Sequence[float] = (0.0, 1.0)) -> list[Rollout]:
    return [
        Rollout(rollout.prompt, rollout.completion(str), Reward(reward, {}), 0)
        for rollout, reward in zip(group.rollouts, rewards, strict=True)
    ]


def complete(buffer: RolloutBuffer, numbers: Sequence[int], version: int, **rewards: Any) -> None:
    """Sample and score the groups of these numbers."""
    groups = {group: sample(group, version) for group in buffer.groups_to_sample() if group.number in numbers}
    buffer.continued(groups)
    for group in buffer.groups_to_score():
        buffer.put(group, scored(group, **rewards))


def numbers_of(groups: Sequence[OpenGroup]) -> list[int]:
    return [group.number for group in groups]


def test_sampling_is_ahead_of_training_by_max_staleness() -> None:
    buffer = buffer_of()  # max_staleness is two steps
    buffer.begin_step(0)
    assert numbers_of(buffer.groups_to_sample()) == list(range(3 * QUOTA))
    complete(buffer, range(9), 0)
    assert buffer.groups_to_sample() == []
    assert list(buffer.get().numbers) == [0, 1, 2]
    assert buffer.groups_to_sample() == [], "the servers have the weights of the step that trains"
    buffer.weights_changed()
    assert numbers_of(buffer.groups_to_sample()) == [9, 10, 11]


def test_a_step_takes_the_first_complete_groups_and_the_rest_is_for_the_checkpoint() -> None:
    buffer = buffer_of()
    buffer.begin_step(0)
    complete(buffer, [1, 4], 0)
    assert not buffer.is_ready()
    complete(buffer, [8, 5], 0)
    assert buffer.is_ready()
    taken = buffer.get()
    assert list(taken.numbers) == [1, 4, 5]
    assert {key: rollout.prompt.index for key, rollout in taken.rollouts.items()} == {
        number * SIZE + member: number for number in (1, 4, 5) for member in range(SIZE)
    }
    assert numbers_of(taken.rest.groups) == [0, 2, 3, 6, 7, 8]
    assert taken.rest.taken == 9
    assert buffer.metrics().ready == 4
    assert buffer.metrics().ready == 0, "counts start again"


def test_groups_that_are_too_old_are_dropped_and_sampled_again() -> None:
    buffer = buffer_of()
    buffer.begin_step(0)
    (old, *_) = buffer.groups_to_sample()
    continued = sample(old, 0, is_done=False)
    buffer.continued({old: continued})
    complete(buffer, [1, 2, 3, 4], 0)
    buffer.get()
    buffer.begin_step(4)
    assert buffer.metrics().dropped == 0, "an age of 4 is allowed"
    buffer.begin_step(6)
    assert buffer.metrics().dropped == 2, "number 4 is complete, and as old"
    buffer.weights_changed()
    again = [group for group in buffer.groups_to_sample() if group.number in (0, 4)]
    assert [group.is_second for group in again] == [True, True]
    buffer.continued({continued: sample(continued, 6)})
    assert buffer.groups_to_score() == [], "a slice of a group that was dropped meanwhile has no effect"
    complete(buffer, [0], 6)
    complete(buffer, [5, 6, 7], 10)
    buffer.begin_step(10)
    assert buffer.metrics().dropped == 0, "an age of 4 is allowed"
    assert buffer.get().numbers[-1] == 0, "a second group that would be too old in the next step is used before others"


def test_second_groups_beyond_the_quota_are_dropped_when_they_are_too_old(caplog: pytest.LogCaptureFixture) -> None:
    """Six groups get their second first token at once: a step has places for three of them."""
    buffer, trained = buffer_of(), list[int]()
    buffer.begin_step(0)
    buffer.continued({group: sample(group, 0, is_done=False) for group in buffer.groups_to_sample()[:6]})
    for version, expected in ((6, [6, 7, 8]), (8, [9, 10, 11]), (10, [0, 1, 2]), (12, [3, 4, 5])):
        buffer.weights_changed()
        buffer.begin_step(version)
        if version == 6:
            again = {group: sample(group, 6, is_done=False) for group in buffer.groups_to_sample() if group.is_second}
            assert numbers_of(list(again)) == list(range(6))
            buffer.continued(again)
        complete(buffer, expected, version)
        taken = buffer.get()
        assert list(taken.numbers) == expected
        trained += taken.numbers
        for each in (rollout.completion for rollout in taken.rollouts.values()):
            versions = [each.policy_version] if each.policy_versions is None else each.policy_versions
            assert version - min(versions) <= 4
    assert buffer.metrics().dropped == 6 + 3
    assert "3 groups are older than max_staleness=4 for the second time" in caplog.text
    assert sorted(trained) == list(range(12)), "every prompt is trained once"


def test_a_score_that_arrives_after_its_group_was_dropped_is_ignored() -> None:
    buffer = buffer_of()
    buffer.begin_step(0)
    group = buffer.groups_to_sample()[0]
    buffer.continued({group: sample(group, 0)})
    (late,) = buffer.groups_to_score()
    buffer.begin_step(6)
    buffer.put(late, scored(late))
    complete(buffer, [1, 2], 6)
    assert not buffer.is_ready()
    complete(buffer, [3], 6)
    buffer.get()
    assert buffer.metrics().ready == 3


def test_groups_whose_scoring_was_interrupted_are_scored_again() -> None:
    buffer = buffer_of()
    buffer.begin_step(0)
    group = buffer.groups_to_sample()[0]
    buffer.continued({group: sample(group, 0)})
    found = buffer.groups_to_score()
    assert buffer.groups_to_score() == []
    buffer.requeue_scoring()
    assert buffer.groups_to_score() == found


@pytest.mark.parametrize(("most", "expected"), [(0, [0, 1, 2]), (2, [2, 3, 4]), (9, [3, 4, 5])])
def test_degenerate_groups_are_replaced_when_they_are_put(most: int, expected: list[int]) -> None:
    buffer = buffer_of(replace(LIMITS, max_discarded=most))
    buffer.begin_step(0)
    complete(buffer, [0, 1, 2], 0, rewards=(1.0, 1.0))
    complete(buffer, [3, 4, 5], 0)
    assert buffer.metrics().discarded == min(3, most)
    assert list(buffer.get().numbers) == expected


def test_every_prompt_is_used_once_over_kills_at_random_moments() -> None:
    """A kill restores the buffer of the last checkpoint, and the steps after it have not been."""
    num_kills = 0
    for seed in range(30):
        rng = random.Random(seed)
        buffer, step, trained = buffer_of(), 0, list[list[int]]()
        saved = CarriedRollouts.after_step(0, PromptShard(0, 1, QUOTA))
        while step < 12:
            if rng.random() < 0.2:
                content = saved.to_bytes()
                buffer = buffer_of(carried=CarriedRollouts.from_bytes(content, prompt_of))
                num_kills += 1
            buffer.begin_step(step * UPDATES)
            buffer.weights_changed()
            while not buffer.is_ready():
                complete(buffer, [n for n in range(100) if rng.random() < 0.2], step * UPDATES)
            complete(buffer, [n for n in range(100) if rng.random() < 0.1], step * UPDATES)
            if rng.random() < 0.1:
                continue  # the step is begun again, as after a failure of the server
            taken = buffer.get()
            complete(buffer, [n for n in range(100) if rng.random() < 0.3], step * UPDATES)
            if rng.random() < 0.2:  # killed during training
                buffer = buffer_of(carried=CarriedRollouts.from_bytes(saved.to_bytes(), prompt_of))
                num_kills += 1
                continue
            step, saved = step + 1, taken.rest
            trained.append(list(taken.numbers))
        used = [number for numbers in trained for number in numbers]
        left = numbers_of(saved.groups) + [number for number, _ in saved.waiting]
        assert sorted(used + left) == list(range(saved.taken)), f"seed {seed}"
    assert num_kills > 50

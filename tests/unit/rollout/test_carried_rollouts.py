"""Prompt accounting and files of carried rollouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from grpo_mega.environments.base import Turn
from grpo_mega.rollout.carried_rollouts import CarriedRollouts, OpenGroup, PromptShard, redistribute
from grpo_mega.rollout.open_rollout import OpenRollout
from grpo_mega.types import Completion, Prompt


def prompt_of(number: int) -> Prompt:
    return Prompt(number, f"q{number}", (number + 1,), "")


def numbers(carried: CarriedRollouts) -> list[int]:
    return [group.number for group in carried.groups]


def test_the_shards_take_every_number_once_in_the_order_of_the_steps() -> None:
    shards = [PromptShard(index, 3, 5) for index in range(3)]
    assert [shard.quota for shard in shards] == [2, 2, 1]
    taken = [[shard.number(i) for i in range(2 * shard.quota)] for shard in shards]
    assert taken == [[0, 3, 5, 8], [1, 4, 6, 9], [2, 7]]
    assert CarriedRollouts.after_step(4, shards[0]).taken == 8


def test_dropped_prompts_are_sampled_again_before_others_and_marked() -> None:
    carried = CarriedRollouts.after_step(0, PromptShard(0, 1, 4)).fill(4, 2, prompt_of)
    assert numbers(carried) == [0, 1, 2, 3]
    dropped = carried.drop(lambda group: group.number in (1, 2), is_second=True)
    assert (numbers(dropped), dropped.waiting, dropped.taken) == ([0, 3], ((1, True), (2, True)), 4)
    filled = dropped.fill(5, 2, prompt_of)
    assert numbers(filled) == [0, 3, 1, 2, 4]
    assert [group.is_second for group in filled.groups] == [False, False, True, True, False]
    assert filled.groups[2].num_sampled == 0
    assert filled.fill(3, 2, prompt_of) is not None, "more groups than wanted stay"
    again = filled.drop(lambda group: group.number == 1, is_second=False)
    assert again.waiting == ((1, True),), "a mark stays"


def open_group() -> OpenGroup:
    first, second, third = OpenRollout(prompt_of(6)), OpenRollout(prompt_of(6)), OpenRollout(prompt_of(6))
    record = torch.arange(8, dtype=torch.uint8).view(4, 2, 1)
    first.add_sampled(Completion([4, 5], [-0.5, -0.1], "length", 3, "", record[:2]))
    first.add_sampled(Completion([6], [-0.25], "stop", 5, "", record))
    first.end_answer(Turn("ab", stop_text="!"))
    first.add_reply("réply", [8, 9])
    third.add_sampled(Completion([7], [-2.0], "eos", 3, "", record[:1]))
    third.is_done, third.failure = True, "the tool failed"
    return OpenGroup(6, (first, second, third), is_second=True)


def test_a_file_has_everything_that_is_carried_bit_by_bit() -> None:
    shard = PromptShard(1, 2, 8)
    carried = CarriedRollouts(shard, 9, (open_group(), OpenGroup(3, (OpenRollout(prompt_of(3)),) * 3)), ((4, False),))
    content = carried.to_bytes()
    found = CarriedRollouts.from_bytes(content, prompt_of)
    assert found.to_bytes() == content
    assert (found.shard, found.taken, found.waiting) == (shard, 9, ((4, False),))
    assert [(group.number, group.is_second, group.is_done) for group in found.groups] == [
        (6, True, False),
        (3, False, False),
    ]
    assert found.num_tokens == 6
    wanted, first = open_group().rollouts[0], found.groups[0].rollouts[0]
    assert first.prompt == prompt_of(6)
    assert [part.policy_version for part in first.parts] == [3, 5, -1]
    for ours, theirs in zip(first.parts, wanted.parts, strict=True):
        assert ours.token_ids.tobytes() == theirs.token_ids.tobytes()
        assert ours.log_probs.tobytes() == theirs.log_probs.tobytes()
    assert first.turns == [Turn("ab", "réply", "!")]
    assert first.expert_choices is not None
    assert first.expert_choices.flatten().tolist() == list(range(8))  # the prompt and three tokens
    third = found.groups[0].rollouts[2]
    assert (third.is_done, third.failure, third.stop_reason, first.answer_start) == (True, "the tool failed", "eos", 3)
    assert CarriedRollouts.from_bytes(CarriedRollouts.after_step(3, shard).to_bytes(), prompt_of).groups == ()


def test_a_file_of_another_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_mega.rollout.carried_rollouts.FORMAT", 0)
    content = CarriedRollouts.after_step(3, PromptShard(0, 1, 4)).to_bytes()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format=0 of carried rollouts; this program reads 1"):
        CarriedRollouts.from_bytes(content, prompt_of)


@pytest.mark.parametrize("num_new", [1, 2, 3, 5])
def test_another_number_of_shards_loses_no_prompt_and_doubles_none(num_new: int) -> None:
    """Shard 0 is one step further than shard 1; some of their groups are trained already."""
    per_step, old = 5, [PromptShard(index, 2, 5) for index in range(2)]
    parts = [CarriedRollouts(old[0], 8).fill(3, 2, prompt_of), CarriedRollouts(old[1], 3).fill(2, 2, prompt_of)]
    parts[1] = parts[1].drop(lambda group: group.number == parts[1].groups[0].number, is_second=True)
    trained = {old[0].number(i) for i in range(8)} | {old[1].number(i) for i in range(3)}
    shards = [PromptShard(index, num_new, per_step) for index in range(num_new)]
    new = [redistribute(parts, shard) for shard in shards]
    assert sorted(n for part in new for n in numbers(part)) == sorted(n for part in parts for n in numbers(part))
    filled = [part.fill(len(part.groups) + len(part.waiting) + 2 * part.shard.quota, 2, prompt_of) for part in new]
    found = [n for part in filled for n in numbers(part)]
    assert len(found) == len(set(found)), "no prompt is sampled twice"
    assert set(found) | trained == set(range(max(found) + 1)), "no prompt is left out"
    assert not set(found) & trained
    assert sum(group.is_second for part in filled for group in part.groups) == 1
    assert replace(new[0]).taken == 4 * shards[0].quota  # the first step of which no shard has taken a prompt

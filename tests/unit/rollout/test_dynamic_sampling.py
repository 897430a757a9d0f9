"""Sampling of the groups of a step, and replacement of degenerate groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from grpo_mega.config.load import load_config
from grpo_mega.config.schema import Config
from grpo_mega.data.dataset import DataSet, PromptDataset
from grpo_mega.rollout.dynamic_sampling import GroupSource
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.types import Completion, Prompt, Reward, Rollout, SamplingRequest, UserError

QUICKSTART = Path(__file__).resolve().parents[3] / "configs" / "quickstart.yaml"
PER_STEP = 6


@dataclass
class Recorder:
    """Sampler of groups of two that records its calls; a group has equal rewards unless `is_useful(prompt)`."""

    is_useful: Callable[[int], bool]
    is_unscored: Callable[[int], bool] = lambda _: False
    """The second rollout of the group could not be scored."""
    returns_records: bool = False
    """Return routing records for all rollouts except the first."""
    calls: list[tuple[list[int], tuple[object, ...]]] = field(default_factory=list)
    asked: list[bool] = field(default_factory=list)

    def sample(self, prompts: Sequence[Prompt], request: SamplingRequest, seed_of: Sequence[object]) -> SampledGroups:
        self.calls.append(([p.index for p in prompts], tuple(seed_of)))
        self.asked.append(request.expert_choices)
        assert request.group_size == 2
        rollouts = []
        for prompt in prompts:
            for reward in (0.0, float(self.is_useful(prompt.index))):
                choices = torch.zeros(1, 1, 1, dtype=torch.uint8) if self.returns_records and rollouts else None
                completion = Completion((1,), (0.0,), "eos", 0, f"{seed_of}", choices)
                lost = len(rollouts) % 2 == 1 and self.is_unscored(prompt.index)
                rollouts.append(Rollout(prompt, completion, Reward(None if lost else reward), 0))
        return SampledGroups.of(rollouts, 2)


def make_config(*overrides: str) -> Config:
    keys = (f"data.prompts_per_step={PER_STEP}", "train.minibatches_per_epoch=1", "sampling.group_size=2")
    return load_config(QUICKSTART, [*keys, *overrides])


def make_source(recorder: Recorder, *overrides: str, num_prompts: int = 40) -> GroupSource:
    prompts = tuple(Prompt(i, str(i), (i,), "") for i in range(num_prompts))
    return GroupSource(recorder, PromptDataset((DataSet("test", prompts),)), make_config(*overrides))


def prompt_indices(groups: SampledGroups) -> list[int]:
    assert groups.table.prompt_index.tolist() == [prompt.index for prompt in groups.prompts for _ in range(2)]
    return [prompt.index for prompt in groups.prompts]


def test_routing_replay_without_routing_records_is_an_error_that_names_the_engine() -> None:
    keys = "algorithm.routing_replay=true"
    for count, returns_records in ((12, False), (1, True)):
        recorder = Recorder(lambda _: True, returns_records=returns_records)
        with pytest.raises(UserError, match=r"set algorithm\.routing_replay=false") as error:
            make_source(recorder, keys).sample(1)
        assert str(error.value).startswith("algorithm.routing_replay=true: engine.kind=vllm")
        assert f"{count} of 12 rollouts" in str(error.value)
        assert f"prompt {recorder.calls[0][0][0]}" in str(error.value)
        assert recorder.asked == [True]
    plain = Recorder(lambda _: True)
    make_source(plain).sample(1)
    assert plain.asked == [False]


@pytest.mark.parametrize("degenerate", ["keep", "drop"])
def test_without_refill_a_step_samples_its_own_prompts_once(degenerate: str) -> None:
    recorder = Recorder(lambda _: False)
    groups = make_source(recorder, f"algorithm.degenerate={degenerate}").sample(3)
    assert [seed for _, seed in recorder.calls] == [("train", 0, 3)]
    assert prompt_indices(groups) == recorder.calls[0][0]
    assert groups.num_discarded == 0


def test_refill_replaces_degenerate_groups_in_place_until_none_is_left() -> None:
    recorder = Recorder(lambda index: index % 3 == 0)
    groups = make_source(recorder, "algorithm.degenerate=refill").sample(3)
    own = recorder.calls[0][0]
    found = prompt_indices(groups)
    assert all(index % 3 == 0 for index in found)
    assert len(found) == len(set(found)) == PER_STEP
    assert all(found[place] == index for place, index in enumerate(own) if index % 3 == 0)
    asked = [index for round_, _ in recorder.calls for index in round_]
    assert len(asked) == len(set(asked))  # no prompt twice in a step
    open_places = [sum(index % 3 != 0 for index in own)]
    for indices_of_round, _ in recorder.calls[1:]:
        assert len(indices_of_round) == open_places[-1]
        open_places.append(open_places[-1] - sum(index % 3 == 0 for index in indices_of_round))
    assert open_places[-1] == 0
    assert groups.num_discarded == len(asked) - PER_STEP
    assert groups.tokens.ids.tolist() == list(range(2 * PER_STEP))
    assert groups.tokens.token_ids[groups.tokens.offsets[:-1]].tolist() == groups.table.prompt_index.tolist()
    assert groups.table.reward.tolist() == [0.0, 1.0] * PER_STEP
    seeds = {index: str(seed) for indices, seed in recorder.calls for index in indices}
    assert groups.texts == [seeds[index] for index in found for _ in range(2)]


def test_refill_replaces_groups_with_fewer_than_two_rewards() -> None:
    recorder = Recorder(lambda index: index % 3 == 0, is_unscored=lambda index: index % 2 == 0)
    found = prompt_indices(make_source(recorder, "algorithm.degenerate=refill").sample(3))
    assert len(found) == PER_STEP
    assert all(index % 3 == 0 and index % 2 == 1 for index in found)


def test_rounds_and_steps_have_different_seeds_and_prompts_that_are_reproducible() -> None:
    def calls(step: int) -> list[tuple[list[int], tuple[object, ...]]]:
        recorder = Recorder(lambda index: index % 5 == 0)
        make_source(recorder, "algorithm.degenerate=refill").sample(step)
        return recorder.calls

    first = calls(1)
    assert first == calls(1)
    assert len(first) > 2
    assert [seed for _, seed in first] == [
        ("train", 0, 1),
        *(("train", 0, 1, "refill", i) for i in range(len(first) - 1)),
    ]
    assert first[1][0][:1] != calls(2)[1][0][:1]


def test_refill_ends_with_its_rounds_or_its_prompts() -> None:
    never = Recorder(lambda _: False)
    groups = make_source(never, "algorithm.degenerate=refill", "algorithm.refill_rounds=2").sample(1)
    assert [len(asked) for asked, _ in never.calls] == [PER_STEP] * 3
    assert prompt_indices(groups) == never.calls[0][0]
    assert groups.num_discarded == 2 * PER_STEP
    few = Recorder(lambda _: False)
    make_source(few, "algorithm.degenerate=refill", num_prompts=10).sample(1)
    assert [len(asked) for asked, _ in few.calls] == [PER_STEP, 4]


def test_a_step_without_degenerate_groups_samples_once() -> None:
    recorder = Recorder(lambda _: True)
    make_source(recorder, "algorithm.degenerate=refill").sample(1)
    assert len(recorder.calls) == 1

"""The groups of a step, written to its rollout files and read again, are the same arrays."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_mega.data.expert_records import widen_record
from grpo_mega.observe.rollout_files.mismatch_column import as_stored
from grpo_mega.observe.rollout_files.part_writer import write_part
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.recorded_groups import recorded_step
from grpo_mega.trainer.rollout_parts import shard_columns
from grpo_mega.types import Completion, Prompt, Reward, Rollout, UserError
from tests.helpers.token_values import token_values

FIRST = Prompt(7, "12+34=", (1, 2), "46", "sums")
SECOND = Prompt(9, "1+1=", (1, 2, 3), "2", "sums")
PLAIN = Completion((4, 6, 0), (-0.5, -0.25, -0.125), "eos", 3, "46")
EXPERTS = torch.arange(2 * 2 * 3, dtype=torch.uint8).reshape(3, 2, 2)
TURNS = Completion((5, 8, 9, 1), (-1.0, 0.0, -2.0, -3.0), "stop", 4, "x", EXPERTS, (True, False, True, True), 2)
GROUPS = {
    "plain": [
        Rollout(FIRST, PLAIN, Reward(1.0, {"exact": 1.0, "length": 0.5}, ("format",)), 1),
        Rollout(FIRST, replace(PLAIN, stop_reason="length"), Reward(0.0, {"exact": 0.0}), 0),
    ],
    "with everything": [
        Rollout(FIRST, TURNS, Reward(0.5, {"exact": 0.5}), 0, steps=((0, 0.5), (3, 1.0))),
        Rollout(FIRST, PLAIN, Reward(None, {}), 0, steps=()),
        Rollout(SECOND, PLAIN, Reward(1.0, {"exact": 1.0}), 1),
        Rollout(SECOND, replace(TURNS, policy_versions=(3, -1, 3, 4)), Reward(0.25, {"exact": 0.25}), 1),
    ],
}


def assert_equal(found: object, wanted: object) -> None:
    """Compare all fields of two dataclasses with arrays; NaN equals NaN."""
    assert type(found) is type(wanted)
    for each in fields(found):  # type: ignore[arg-type]
        ours, theirs = getattr(found, each.name), getattr(wanted, each.name)
        if not isinstance(theirs, np.ndarray):
            assert ours == theirs, each.name
        else:
            np.testing.assert_array_equal(ours, theirs, each.name)


def written(folder: Path, name: str, advantages: np.ndarray) -> SampledGroups:
    rollouts = GROUPS[name]
    groups = SampledGroups.of(rollouts, 2)
    olds = [[-0.5 * (i + 1)] * rollout.completion.num_loss_tokens for i, rollout in enumerate(rollouts)]
    write_part(folder, 0, 1, shard_columns(4, groups, advantages, token_values(olds)))
    return groups


@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_of_a_step_are_read_as_they_were_written(tmp_path: Path, name: str) -> None:
    advantages = np.linspace(-1, 1, len(GROUPS[name]))
    groups = written(tmp_path, name, advantages)
    found = recorded_step(tmp_path, groups.table.component_names, len(advantages))
    experts = groups.tokens.expert_choices
    wide = None if experts is None else widen_record(torch.from_numpy(experts)).numpy()
    assert_equal(found.groups.tokens, replace(groups.tokens, expert_choices=wide))
    assert_equal(found.groups.table, groups.table)
    assert list(found.groups.prompts) == list(groups.prompts)
    assert list(found.groups.texts) == list(groups.texts)
    assert list(found.groups.failures) == list(groups.failures)
    np.testing.assert_array_equal(found.advantages, advantages)
    sampled = groups.tokens.on_loss_tokens(groups.tokens.sampler_log_probs)
    old = np.repeat(-0.5 * (1 + np.arange(len(advantages))), sampled.counts).astype(np.float32)
    stored = sampled.with_values(as_stored(old, sampled.values))
    assert found.old_log_probs.by_rollout() == stored.by_rollout()


def test_a_step_of_which_only_some_groups_were_written_is_rejected(tmp_path: Path) -> None:
    written(tmp_path, "plain", np.zeros(2))
    with pytest.raises(UserError, match=r"has 2 of the 4 rollouts of the step; .*observe\.rollouts=all"):
        recorded_step(tmp_path, (), 4)

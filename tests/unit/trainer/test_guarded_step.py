"""grpo_mega.trainer.guarded_step: the metrics of a step reach the rules, and the report names the groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grpo_mega.config.guard_section import GuardConfig
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.guarded_step import check_rollouts, finish_guarded_step, offending_rollouts
from grpo_mega.trainer.run_guard import GuardStopError, RunGuard
from grpo_mega.types import Completion, Prompt, Reward, Rollout, UpdateStats
from tests.helpers.thread_ranks import one_rank

NO_TOKENS = {"train/mismatch_kl": 0.0}


def groups_of() -> SampledGroups:
    """Three groups of two: equal rewards; a truncated rollout; neither."""
    rewards = (1.0, 1.0, 0.0, 1.0, 1.0, 0.0)
    stops: Any = ("eos", "eos", "length", "eos", "eos", "eos")
    return SampledGroups.of(
        [
            Rollout(Prompt(i // 2, "", (1, 2), ""), Completion((3, 4), (0.0, 0.0), stop, 0, ""), Reward(reward), 0)
            for i, (reward, stop) in enumerate(zip(rewards, stops, strict=True))
        ],
        2,
    )


def guard_of(**rules: Any) -> RunGuard:
    guard = RunGuard(GuardConfig.model_validate({"rules": rules}), one_rank().ranks)
    guard.start_step(1)
    return guard


def is_right(table: Any) -> Any:
    return table.reward == 1.0


def update() -> UpdateStats:
    return UpdateStats(1.0, 0.1, {"loss": 0.5, "entropy": 0.7}, {})


@pytest.mark.parametrize(
    ("rule", "threshold", "groups"),
    [("truncation", 0.1, [False, True, False]), ("degenerate", 0.3, [True, False, False])],
)
def test_the_groups_at_fault_go_to_quarantine(rule: str, threshold: float, groups: list[bool]) -> None:
    """1 of 6 rollouts is truncated, 1 of 3 groups is degenerate; the accuracy is 4 / 6."""
    guard, found = guard_of(**{rule: {"action": "quarantine", "threshold": threshold}}), groups_of()
    check_rollouts(guard, found, is_right)
    assert not guard.allows([(0, 1), (2, 3), (4, 5)])(update())
    report = finish_guarded_step(guard, found, [], NO_TOKENS, lambda mine: mine)
    assert report.quarantined is not None
    assert report.quarantined.tolist() == groups
    assert report.metrics["guard/quarantined_groups"] == 1
    assert [held.rule for held in report.findings] == [rule]
    assert (report.prompts_step, report.attempt) == (1, 0)


def test_other_rules_blame_every_rollout() -> None:
    assert np.array_equal(offending_rollouts(groups_of(), "reward_collapse"), np.arange(6))


def test_without_a_rule_on_rollouts_no_metric_is_computed() -> None:
    guard = guard_of()
    check_rollouts(guard, groups_of(), lambda table: pytest.fail("computed"))
    report = finish_guarded_step(guard, groups_of(), [update()], NO_TOKENS, lambda mine: pytest.fail("a collective"))
    assert report.quarantined is None
    assert report.findings == ()


def test_the_mismatch_of_the_step_is_checked_against_the_steps_before() -> None:
    guard = guard_of(mismatch="stop")
    for step in range(1, 11):
        guard.start_step(step)
        finish_guarded_step(guard, groups_of(), [update()], {"train/mismatch_kl": 0.001}, lambda mine: mine)
    guard.start_step(11)
    with pytest.raises(GuardStopError, match="step 11: policy and engine differ"):
        finish_guarded_step(guard, groups_of(), [update()], {"train/mismatch_kl": 0.5}, lambda mine: mine)

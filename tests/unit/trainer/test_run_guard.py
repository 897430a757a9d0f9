"""grpo_mega.trainer.run_guard: which action each rule leads to, with numbers worked by hand."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from grpo_mega.config.guard_section import GuardConfig
from grpo_mega.observe.rollbacks import Rollback, Rollbacks
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.guard_report import HeldRule
from grpo_mega.trainer.run_guard import GuardStopError, RollbackRequest, RunGuard, offending_rollouts
from grpo_mega.types import Completion, Prompt, Reward, Rollout, UpdateStats

TOPOLOGY = Topology(1)
RANKS = Ranks(TOPOLOGY, TOPOLOGY.coordinates(0), torch.device("cpu"))
ROWS = [(0, 1), (2,), (3, 5)]


def guard_of(rollbacks: Rollbacks = Rollbacks(), max_rollbacks: int = 3, **rules: Any) -> RunGuard:  # noqa: B008 - frozen
    guard = RunGuard(GuardConfig(rules=rules, max_rollbacks=max_rollbacks), RANKS, rollbacks)  # type: ignore[arg-type]
    guard.start_step(7)
    return guard


def healthy_steps(guard: RunGuard, **metrics: float) -> None:
    guard.returned(guard.rollbacks, [(step, {"train/grad_norm": 2.0, **metrics}) for step in range(1, 13)])
    guard.start_step(13)


def stats(grad_norm: float = 2.0, fault: str | None = None, rows: tuple[int, ...] = (), **sums: float) -> UpdateStats:
    return UpdateStats(grad_norm, 0.0, {"loss": 0.5, **sums}, {}, fault, non_finite_rows=rows)


def test_a_finite_update_is_allowed_and_nothing_is_found() -> None:
    guard = guard_of()
    assert guard.allows(ROWS)(stats())
    assert guard.findings == ()
    assert guard.metrics() == {
        "guard/warnings": 0.0,
        "guard/skipped_updates": 0.0,
        "guard/quarantined_groups": 0.0,
        "guard/rollbacks": 0.0,
    }


def test_stop_names_step_reason_and_the_override_that_continues() -> None:
    with pytest.raises(GuardStopError) as raised:
        guard_of().allows(ROWS)(stats(math.nan, "the loss of microbatch 1 on rank 0 is not finite"))
    message = str(raised.value)
    assert message.startswith("step 7: the loss of microbatch 1 on rank 0 is not finite")
    assert "guard.rules.non_finite=stop" in message
    assert raised.value.continue_with == "guard.rules.non_finite=rollback"


def test_skip_update_skips_this_update_only(caplog: pytest.LogCaptureFixture) -> None:
    guard = guard_of(non_finite="skip_update")
    with caplog.at_level(logging.WARNING):
        assert not guard.allows(ROWS)(stats(math.inf, "the gradient norm is inf although every loss is finite"))
    assert guard.allows(ROWS)(stats())
    assert guard.metrics()["guard/skipped_updates"] == 1
    assert guard.skipped_non_finite
    assert not guard.has_quarantined
    assert "step 7: the gradient norm is inf" in caplog.text
    assert "the update is skipped (guard.rules.non_finite=skip_update)" in caplog.text
    guard.start_step(8)
    assert guard.metrics()["guard/skipped_updates"] == 0


@pytest.mark.parametrize(
    ("update", "groups"),
    [
        # the loss of the second row is not finite: its rollout 2 is of group 1
        (stats(math.nan, "the loss of microbatch 1", (1,), loss=math.nan), [False, True, False]),
        # of a gradient, the whole minibatch
        (stats(math.nan, "the gradient norm is nan"), [True, True, True]),
        # a loss that is not finite on another rank only
        (stats(math.nan, "the loss of microbatch 0", (), loss=math.inf), [False, False, False]),
    ],
)
def test_quarantine_selects_the_groups_of_the_fault(update: UpdateStats, groups: list[bool]) -> None:
    guard = guard_of(non_finite="quarantine")
    assert not guard.allows(ROWS)(update)
    assert guard.has_quarantined
    assert guard.quarantined_groups(6, 2, lambda mine: mine).tolist() == groups
    assert guard.metrics()["guard/quarantined_groups"] == sum(groups)


def test_rollback_is_requested_until_the_limit_and_then_the_run_stops() -> None:
    one = Rollbacks((Rollback(7, 4, "non_finite", ""),))
    broken = stats(math.nan, "the gradient norm is nan")
    with pytest.raises(RollbackRequest) as raised:
        guard_of(one, max_rollbacks=2, non_finite="rollback").allows(ROWS)(broken)
    assert (raised.value.step, raised.value.rule, raised.value.reason) == (7, "non_finite", "the gradient norm is nan")
    with pytest.raises(GuardStopError, match=r"rolled back 1 times already.*guard.max_rollbacks=1") as stopped:
        guard_of(one, max_rollbacks=1, non_finite="rollback").allows(ROWS)(broken)
    assert stopped.value.continue_with == "guard.max_rollbacks=4"
    assert guard_of(one).metrics()["guard/rollbacks"] == 1  # step 7 is after the checkpoint of step 4


def test_a_spike_is_measured_against_the_steps_before_and_each_update_by_itself() -> None:
    guard = guard_of(gradient_spike={"action": "skip_update", "threshold": 10})
    healthy_steps(guard)
    allows = guard.allows(ROWS)
    assert [allows(stats(norm)) for norm in (20.0, 20.1, 5.0)] == [True, False, True]
    assert guard.metrics()["guard/skipped_updates"] == 1
    guard.end_step({"train/grad_norm": 12.5})  # mean of the two updates that were made
    guard.start_step(14)
    assert not guard.allows(ROWS)(stats(21.0))  # the median is still 2


def test_the_strongest_action_of_several_rules_counts() -> None:
    guard = guard_of(gradient_spike="warn", kl={"action": "skip_update", "threshold": 1.0})
    healthy_steps(guard)
    assert guard.allows(ROWS)(stats(1e6, kl=0.5))
    assert not guard.allows(ROWS)(stats(1e6, kl=1.5))
    assert [(found.rule, found.action) for found in guard.findings] == [
        ("gradient_spike", "warn"),
        ("kl", "skip_update"),
    ]
    assert guard.metrics()["guard/warnings"] == 1


def test_the_rules_on_gradients_do_not_apply_to_the_critic() -> None:
    guard = guard_of(gradient_spike={"action": "stop", "threshold": 2}, non_finite="skip_update")
    healthy_steps(guard)
    assert guard.allows(ROWS, of_critic=True)(stats(1e9))
    assert not guard.allows(ROWS, of_critic=True)(stats(math.nan, "the critic's gradient norm is nan"))


def test_a_rule_on_rollouts_skips_every_update_of_the_step_and_quarantines_its_groups() -> None:
    guard = guard_of(truncation={"action": "quarantine", "threshold": 0.25})
    metrics: Mapping[str, float] = {"rollout/truncated_fraction": 0.5}
    guard.check_rollouts(metrics, lambda rule: np.array([4, 5]) if rule == "truncation" else np.array([0]))
    allows = guard.allows(ROWS)
    assert [allows(stats()), allows(stats())] == [False, False]
    assert guard.metrics()["guard/skipped_updates"] == 2
    assert guard.quarantined_groups(6, 2, lambda mine: mine).tolist() == [False, False, True]
    guard.start_step(8)
    guard.check_rollouts({"rollout/truncated_fraction": 0.25})
    assert guard.allows(ROWS)(stats())


def test_a_warning_changes_no_update(caplog: pytest.LogCaptureFixture) -> None:
    guard = guard_of(degenerate="warn")
    with caplog.at_level(logging.WARNING):
        guard.check_rollouts({"group/degenerate_fraction": 1.0, "reward/accuracy": 0.0})
    assert guard.allows(ROWS)(stats())
    assert guard.findings == (
        HeldRule("degenerate", "warn", "the rewards of 100% of the groups are equal, so the gradient is zero"),
    )
    assert "(guard.rules.degenerate=warn)" in caplog.text
    assert "skipped" not in caplog.text


def test_the_mismatch_of_a_step_is_checked_after_its_updates() -> None:
    guard = guard_of(mismatch="stop")
    healthy_steps(guard, **{"train/mismatch_kl": 0.001})
    guard.check_mismatch({"train/mismatch_kl": 0.009})
    with pytest.raises(GuardStopError, match=r"policy and engine differ by 0\.011 nats per token") as raised:
        guard.check_mismatch({"train/mismatch_kl": 0.011})
    assert raised.value.continue_with == "guard.rules.mismatch=warn"


def test_a_continued_run_decides_as_the_uninterrupted_one() -> None:
    """Its history is that of metrics.jsonl, although the step of the rollback had other values before."""
    rule: Any = {"action": "skip_update", "threshold": 10}
    lines = [(step, {"train/grad_norm": 2.0, "reward/mean": 0.5}) for step in range(1, 13)]
    uninterrupted, continued = guard_of(gradient_spike=rule), guard_of(gradient_spike=rule)
    for step, metrics in lines:
        uninterrupted.start_step(step)
        uninterrupted.allows(ROWS)(stats(2.0))
        uninterrupted.end_step(metrics)
    continued.returned(Rollbacks(), lines)
    for guard in (uninterrupted, continued):
        guard.start_step(13)
        assert [guard.allows(ROWS)(stats(norm)) for norm in (20.0, 20.1)] == [True, False]


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


def is_right(table: Any) -> Any:
    return table.reward == 1.0


@pytest.mark.parametrize(
    ("rule", "threshold", "groups"),
    [("truncation", 0.1, [False, True, False]), ("degenerate", 0.3, [True, False, False])],
)
def test_the_groups_at_fault_go_to_quarantine(rule: str, threshold: float, groups: list[bool]) -> None:
    """1 of 6 rollouts is truncated, 1 of 3 groups is degenerate; the accuracy is 4 / 6."""
    guard, found = guard_of(**{rule: {"action": "quarantine", "threshold": threshold}}), groups_of()
    guard.check_groups(found, is_right)
    assert not guard.allows([(0, 1), (2, 3), (4, 5)])(stats(entropy=0.7))
    report = guard.finish_step(found, [], NO_TOKENS, lambda mine: mine)
    assert report.quarantined is not None
    assert report.quarantined.tolist() == groups
    assert report.metrics["guard/quarantined_groups"] == 1
    assert [held.rule for held in report.findings] == [rule]
    assert (report.prompts_step, report.attempt) == (7, 0)


def test_other_rules_blame_every_rollout() -> None:
    assert np.array_equal(offending_rollouts(groups_of(), "reward_collapse"), np.arange(6))


def test_without_a_rule_on_rollouts_no_metric_is_computed() -> None:
    guard = guard_of()
    guard.check_groups(groups_of(), lambda table: pytest.fail("computed"))
    report = guard.finish_step(groups_of(), [stats(entropy=0.7)], NO_TOKENS, lambda mine: pytest.fail("a collective"))
    assert report.quarantined is None
    assert report.findings == ()


def test_the_mismatch_of_the_step_is_checked_against_the_steps_before() -> None:
    guard = guard_of(mismatch="stop")
    for step in range(1, 11):
        guard.start_step(step)
        guard.finish_step(groups_of(), [stats(entropy=0.7)], {"train/mismatch_kl": 0.001}, lambda mine: mine)
    guard.start_step(11)
    with pytest.raises(GuardStopError, match="step 11: policy and engine differ"):
        guard.finish_step(groups_of(), [stats(entropy=0.7)], {"train/mismatch_kl": 0.5}, lambda mine: mine)

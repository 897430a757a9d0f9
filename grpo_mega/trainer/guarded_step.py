"""Connects a step of the loop with the rules of `guard.rules`: the metrics that they read, and the report of the step.

Asserted by tests/unit/trainer/test_guarded_step.py and tests/e2e/test_guard.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.run_guard import GuardReport, RunGuard
from grpo_mega.trainer.step_metrics import IsRight, reward_metrics, update_metrics
from grpo_mega.types import UpdateStats

SumOverRanks = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def check_rollouts(guard: RunGuard, groups: SampledGroups, is_right: IsRight) -> None:
    """Apply the rules on rollouts before the updates of a step. Collective.

    Args:
        guard: of this rank, at the step.
        groups: rollouts of the step; only their table is read.
        is_right: returns True for each rollout whose reward means a right answer.

    Raises:
        GuardStopError, RollbackRequest: a rule with this action holds.
    """
    if not guard.watches_rollouts:
        return
    truncated = {"rollout/truncated_fraction": float(groups.table.is_truncated.mean())}
    metrics = reward_metrics(groups, is_right(groups.table)) | truncated
    guard.check_rollouts(metrics, lambda rule: offending_rollouts(groups, rule))


def offending_rollouts(groups: SampledGroups, rule: str) -> NDArray[np.int64]:
    """Return the rollouts because of which a rule on rollouts holds, [N] rows of the table: by default all."""
    if rule == "truncation":
        return np.flatnonzero(groups.table.is_truncated)
    if rule == "degenerate":
        return np.flatnonzero(np.repeat(groups.degenerate, groups.group_size))
    return np.arange(len(groups.table))


def finish_guarded_step(
    guard: RunGuard,
    groups: SampledGroups,
    updates: Sequence[UpdateStats],
    of_tokens: Mapping[str, float],
    sum_over_ranks: SumOverRanks,
) -> GuardReport:
    """Apply the rule on the mismatch, keep the metrics of the step for later ones, and report. Collective.

    Args:
        guard: of this rank, at the step.
        groups: rollouts of the step.
        updates: that were made.
        of_tokens: metrics of tokens, equal on every rank.
        sum_over_ranks: adds arrays of all ranks.

    Raises:
        GuardStopError, RollbackRequest: the rule has this action, and holds.
    """
    guard.check_mismatch(of_tokens)
    quarantined = None
    if guard.has_quarantined:
        quarantined = guard.quarantined_groups(len(groups.table), groups.group_size, sum_over_ranks)
    guard.end_step({**update_metrics(updates), **of_tokens})
    return guard.report(quarantined)

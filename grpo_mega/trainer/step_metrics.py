"""Computes the metrics of one step from its rollouts, updates and weight sync. Pure.

Asserted by tests/unit/trainer/test_step_metrics.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_mega.data.rollout_table import RolloutTable
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.batch import TrainBatch
from grpo_mega.trainer.group_metrics import advantage_metrics, percentiles, rollout_metrics
from grpo_mega.trainer.guard_report import GuardReport
from grpo_mega.types import TokenValues, UpdateStats
from grpo_mega.weight_sync.sync import SyncReport

IsRight = Callable[[RolloutTable], NDArray[np.bool_]]
"""Function that returns True for each rollout whose reward means a right answer."""


@dataclass(frozen=True)
class StepResult:
    """Results of a step.

    Attributes:
        step: its number.
        groups: rollouts of the step: the table of all, and tokens and texts of those that this rank sampled.
        batch: rows of this rank, the plan of all ranks, and which rollouts are trained.
        old_log_probs: before the update, of the rollouts that this rank sampled, where they are known; nats, float32.
        mean_advantages: [R] mean over the loss tokens of each rollout of the step.
        updates: statistics of the policy's updates.
        sync: report of the weight sync.
        kl_coef: KL coefficient of the step.
        token_metrics: metrics of tokens and texts, reduced over the ranks (token_metrics.py).
        critic_updates: empty without a critic.
        state_bytes: of this rank.
        checkpoint_wait_seconds: time that the step waited for an earlier save.
        guard: what the rules of `guard.rules` did.
    """

    step: int
    groups: SampledGroups
    batch: TrainBatch
    old_log_probs: TokenValues
    mean_advantages: NDArray[np.float64]
    updates: list[UpdateStats]
    sync: SyncReport
    kl_coef: float
    token_metrics: Mapping[str, float] = field(default_factory=dict)
    critic_updates: list[UpdateStats] = field(default_factory=list)
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    checkpoint_wait_seconds: float = 0.0
    guard: GuardReport = field(default_factory=GuardReport)

    @property
    def table(self) -> RolloutTable:
        """All rollouts of the step, equal on every rank."""
        return self.groups.table

    @property
    def ratio_counts(self) -> NDArray[np.float64]:
        """[N] loss tokens of all updates in the N bins of observe/ratio_bins.py; empty without an update."""
        counts = [update.ratio_counts for update in self.updates if update.ratio_counts]
        return np.sum(counts, axis=0) if counts else np.zeros(0)

    def metrics(self, num_replicas: int, is_right: IsRight, sets: Sequence[str] = ()) -> dict[str, float]:
        """Return all metrics except times, throughput and memory peaks. observe/metric_table.py describes each name.

        Args:
            num_replicas: engine replicas of the run.
            is_right: returns True for each rollout whose reward means a right answer.
            sets: names of the training sets, if there are several; each has its own metrics.
        """
        right = is_right(self.table)
        return {
            **reward_metrics(self.groups, right),
            **rollout_metrics(
                self.table.reward, right, self.table.completion_tokens.astype(float), self.table.group_size
            ),
            **advantage_metrics(self.mean_advantages),
            **_sets(self.table, sets, right),
            **_lengths(self.table, num_replicas),
            **update_metrics(self.updates),
            **self.token_metrics,
            **self.guard.metrics,
            "train/kl_coef": self.kl_coef,
            **_critic(self.critic_updates),
            **{f"memory/{name}_bytes": float(size) for name, size in self.state_bytes.items()},
            "train/num_loss_tokens": float(self.table.loss_tokens[self.batch.is_trained].sum()),
            "train/unused_rollouts": float((~self.batch.is_trained).sum()),
            "train/padding_fraction": self.batch.plan.padding_fraction,
            "train/imbalance": self.batch.plan.imbalance,
            "time/checkpoint_wait_seconds": self.checkpoint_wait_seconds,
            "sync/bytes": float(self.sync.written_bytes),
            "sync/received_bytes": float(self.sync.received_bytes),
            "sync/verify_seconds": self.sync.verify_seconds,
            "sync/gb_per_second": self.sync.written_bytes / 1e9 / self.sync.seconds,
        }


def reward_metrics(groups: SampledGroups, right: NDArray[np.bool_]) -> dict[str, float]:
    """Return the metrics of rewards and groups. Means are over rollouts with a reward; NaN if there is none.

    Args:
        groups: rollouts of the step; only their table is read.
        right: [R] True for a right answer.
    """
    table, scored = groups.table, groups.table.is_scored
    values = table.reward[scored]
    components = {
        f"reward/component/{name}": _mean(column[~np.isnan(column)])
        for name, column in zip(table.component_names, table.components.T, strict=True)
        if not np.isnan(column).all()
    }
    num_degenerate = int(groups.degenerate.sum()) + groups.num_discarded
    return {
        "reward/mean": _mean(values),
        "reward/std": float((values - values[0]).std()) if len(values) else math.nan,  # 0 if all are equal
        "reward/accuracy": _mean(right[scored]),
        "reward/failed_fraction": _mean(table.has_failed),
        "reward/dropped_fraction": _mean(~scored),
        "group/degenerate_fraction": num_degenerate / (table.num_groups + groups.num_discarded),
        "group/discarded": float(groups.num_discarded),
        **components,
    }


def _sets(table: RolloutTable, sets: Sequence[str], right: NDArray[np.bool_]) -> dict[str, float]:
    """Return the metrics of each training set that has rollouts in this step."""
    found: dict[str, float] = {}
    for name in sets:
        own = table.is_from(name)
        if not own.any():
            continue
        scored = own & table.is_scored
        numbers = {
            "rollouts": float(own.sum()),
            "reward_mean": _mean(table.reward[scored]),
            "accuracy": _mean(right[scored]),
            "length_mean": _mean(table.completion_tokens[own]),
            "failed_fraction": _mean(table.has_failed[own]),
            **percentiles("reward_", table.reward[own]),
            **percentiles("length_", table.completion_tokens[own].astype(float)),
        }
        found |= {f"set/{name}/{key}": value for key, value in numbers.items()}
    return found


def _mean(values: NDArray[Any]) -> float:
    """Return the mean of one number per rollout, without rounding errors of the sum; NaN of nothing."""
    if not len(values):
        return math.nan
    total = math.fsum(values) if values.dtype.kind == "f" else int(values.sum())
    return total / len(values)


def _lengths(table: RolloutTable, num_replicas: int) -> dict[str, float]:
    lengths = table.completion_tokens
    per_replica = np.bincount(table.replica, weights=lengths, minlength=num_replicas).tolist()
    return {
        "rollout/length_mean": _mean(lengths),
        "rollout/length_max": float(lengths.max()),
        "rollout/prompt_length_mean": _mean(table.prompt_tokens),
        "rollout/truncated_fraction": _mean(table.is_truncated),
        "rollout/tokens": float(lengths.sum()),
        "rollout/turns_mean": _mean(table.num_turns),
        "rollout/result_tokens": float((lengths - table.loss_tokens).sum()),
        **{f"rollout/tokens_per_replica/{i}": float(n) for i, n in enumerate(per_replica)},
    }


def update_metrics(updates: Sequence[UpdateStats]) -> dict[str, float]:
    """Return the metrics of a step's updates: means, and for maxima the largest of all updates.

    Args:
        updates: with `loss` and `entropy`; other quantities are reported if they are there. Without an update, because
            a rule of `guard.rules` skipped it, there is nothing to report (NaN).
    """
    if not updates:
        names = ("train/loss", "train/entropy", "train/grad_norm", "train/learning_rate")
        return {**dict.fromkeys(names, math.nan), "train/updates": 0.0}
    mean = {name: statistics.fmean(u.sums[name] for u in updates) for name in updates[0].sums}
    found = {
        "train/loss": mean["loss"],
        "train/entropy": mean["entropy"],
        "train/grad_norm": statistics.fmean(u.grad_norm for u in updates),
        "train/learning_rate": updates[-1].learning_rate,
        "train/updates": float(len(updates)),
    }
    optional = {
        "entropy_p10": "train/entropy_p10",
        "clip_fraction": "train/clip_fraction",
        "clip_positive": "train/clip_positive_fraction",
        "clip_negative": "train/clip_negative_fraction",
        "masked_positive": "train/masked_positive_fraction",
        "masked_negative": "train/masked_negative_fraction",
        "kl": "train/kl",
        "correction": "train/correction_mean",
        "masked": "train/masked_fraction",
        "vetoed": "train/vetoed_fraction",
        "aux_loss": "train/aux_loss",
        "fp8_cut": "train/fp8_cut_fraction",
        "fp8_zero": "train/fp8_zero_fraction",
    }
    found |= {name: mean[key] for key, name in optional.items() if key in mean}
    for key, name in (("ratio", "train/ratio_max"), ("fp8_amax", "train/fp8_amax")):
        if key in updates[0].maxima:
            found[name] = max(u.maxima[key] for u in updates)
    return found


def _critic(updates: Sequence[UpdateStats]) -> dict[str, float]:
    """Return means over the step's updates; nothing without a critic."""
    if not updates:
        return {}
    return {
        "critic/loss": statistics.fmean(u.sums["loss"] for u in updates),
        "critic/clip_fraction": statistics.fmean(u.sums["clip_fraction"] for u in updates),
        "critic/grad_norm": statistics.fmean(u.grad_norm for u in updates),
        "critic/learning_rate": updates[-1].learning_rate,
    }

"""Computes the metrics of one step from its rollouts, updates and weight sync. Pure.

Asserted by tests/unit/trainer/test_step_metrics.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, repeat
from typing import Any

import numpy as np

from grpo_mega.algorithm.kl import MAX_REPORTED_LOG_RATIO
from grpo_mega.data.expert_records import widen_record
from grpo_mega.rollout.sampler import SampledGroups
from grpo_mega.trainer.batch import TrainBatch
from grpo_mega.trainer.group_metrics import advantage_metrics, percentiles, rollout_metrics
from grpo_mega.trainer.mismatch_guard import largest_mismatch, with_known
from grpo_mega.trainer.text_metrics import repetition_sums, script_sums, text_metrics
from grpo_mega.types import Reward, Rollout, UpdateStats
from grpo_mega.weight_sync.sync import SyncReport

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class StepResult:
    """Results of a step; equal on every rank except for `state_bytes`.

    `old_log_probs` has one list per rollout, None where they are not known (loop.gather_old_log_probs).
    `critic_updates` is empty without a critic.
    """

    step: int
    groups: SampledGroups
    batch: TrainBatch
    old_log_probs: list[list[float] | None]
    updates: list[UpdateStats]
    sync: SyncReport
    kl_coef: float
    critic_updates: list[UpdateStats] = field(default_factory=list)
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    checkpoint_wait_seconds: float = 0.0

    def metrics(
        self, num_replicas: int, is_right: Callable[[Reward], bool], sets: Sequence[str] = ()
    ) -> dict[str, float]:
        """Return all metrics except times, throughput and memory peaks. observe/metric_table.py describes each name.

        Args:
            num_replicas: engine replicas of the run.
            is_right: returns True if a reward means a right answer.
            sets: names of the training sets, if there are several; each has its own metrics.
        """
        return {
            **_rewards(self.groups, is_right),
            **rollout_metrics(*_columns(self.groups.rollouts, is_right), self.groups.group_size),
            **advantage_metrics(np.array(self.batch.mean_advantages)),
            **_texts(self.groups.rollouts),
            **_sets(self.groups.rollouts, sets, is_right),
            **_lengths(self.groups, num_replicas),
            **update_metrics(self.updates),
            **mismatch(*with_known(self.groups.rollouts, self.old_log_probs)),
            "train/kl_coef": self.kl_coef,
            **_critic(self.critic_updates, self.batch),
            **_replay(self.groups.rollouts),
            **{f"memory/{name}_bytes": float(size) for name, size in self.state_bytes.items()},
            **_trained(self.groups, self.batch.is_trained),
            "time/checkpoint_wait_seconds": self.checkpoint_wait_seconds,
            "sync/bytes": float(self.sync.written_bytes),
            "sync/received_bytes": float(self.sync.received_bytes),
            "sync/verify_seconds": self.sync.verify_seconds,
            "sync/gb_per_second": self.sync.written_bytes / 1e9 / self.sync.seconds,
        }


def _rewards(groups: SampledGroups, is_right: Callable[[Reward], bool]) -> dict[str, float]:
    """Return the metrics of rewards and groups. Means are over rollouts with a reward; NaN if there is none."""
    rewards = [r.reward for r in groups.rollouts]
    values = [r.value for r in rewards if r.value is not None]
    num_groups = len(rewards) // groups.group_size
    num_degenerate = sum(groups.is_degenerate(group) for group in range(num_groups))
    components: dict[str, list[float]] = {}
    for reward in rewards:
        for name, value in reward.components.items():
            components.setdefault(name, []).append(value)
    return {
        "reward/mean": _mean(values),
        "reward/std": statistics.pstdev(values) if values else math.nan,
        "reward/accuracy": _mean([is_right(r) for r in rewards if r.value is not None]),
        "reward/failed_fraction": statistics.fmean(bool(r.failures) for r in rewards),
        "reward/dropped_fraction": statistics.fmean(r.value is None for r in rewards),
        "group/degenerate_fraction": (num_degenerate + groups.num_discarded) / (num_groups + groups.num_discarded),
        "group/discarded": float(groups.num_discarded),
        **{f"reward/component/{name}": statistics.fmean(v) for name, v in components.items()},
    }


def _columns(rollouts: Sequence[Rollout], is_right: Callable[[Reward], bool]) -> tuple[Array, Array, Array]:
    """Return reward (NaN without one), correctness and completion length of each rollout."""
    values = [r.reward.value for r in rollouts]
    return (
        np.array([math.nan if value is None else value for value in values]),
        np.array([value is not None and is_right(r.reward) for r, value in zip(rollouts, values, strict=True)]),
        np.array([len(r.completion.token_ids) for r in rollouts], dtype=np.float64),
    )


def _texts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    tokens = [np.array(r.completion.token_ids, dtype=np.int64) for r in rollouts]
    offsets = np.cumsum([0, *map(len, tokens)])
    scripts = script_sums([r.prompt.text for r in rollouts], [r.completion.text for r in rollouts])
    return text_metrics(repetition_sums(np.concatenate(tokens), offsets), scripts)


def _sets(rollouts: Sequence[Rollout], sets: Sequence[str], is_right: Callable[[Reward], bool]) -> dict[str, float]:
    """Return the metrics of each training set that has rollouts in this step."""
    found: dict[str, float] = {}
    for name in sets:
        own = [r for r in rollouts if r.prompt.data_set == name]
        if not own:
            continue
        rewards = [r.reward for r in own if r.reward.value is not None]
        numbers = {
            "rollouts": float(len(own)),
            "reward_mean": _mean([r.value for r in rewards if r.value is not None]),
            "accuracy": _mean([is_right(r) for r in rewards]),
            "length_mean": statistics.fmean(len(r.completion.token_ids) for r in own),
            "failed_fraction": statistics.fmean(bool(r.reward.failures) for r in own),
        }
        columns = _columns(own, is_right)
        numbers |= percentiles("reward_", columns[0]) | percentiles("length_", columns[2])
        found |= {f"set/{name}/{key}": value for key, value in numbers.items()}
    return found


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _lengths(groups: SampledGroups, num_replicas: int) -> dict[str, float]:
    lengths = [len(r.completion.token_ids) for r in groups.rollouts]
    return {
        "rollout/length_mean": statistics.fmean(lengths),
        "rollout/length_max": float(max(lengths)),
        "rollout/prompt_length_mean": statistics.fmean(len(r.prompt.token_ids) for r in groups.rollouts),
        "rollout/truncated_fraction": statistics.fmean(r.completion.stop_reason == "length" for r in groups.rollouts),
        "rollout/tokens": float(sum(lengths)),
        "rollout/turns_mean": statistics.fmean(r.completion.num_turns for r in groups.rollouts),
        "rollout/result_tokens": float(sum(lengths) - sum(r.completion.num_loss_tokens for r in groups.rollouts)),
        **{f"rollout/tokens_per_replica/{i}": float(n) for i, n in enumerate(groups.tokens_per_replica(num_replicas))},
    }


def _trained(groups: SampledGroups, is_trained: Sequence[bool]) -> dict[str, float]:
    lengths = [r.completion.num_loss_tokens for r in groups.rollouts]
    return {
        "train/num_loss_tokens": float(sum(n for n, used in zip(lengths, is_trained, strict=True) if used)),
        "train/unused_rollouts": float(len(is_trained) - sum(is_trained)),
    }


def update_metrics(updates: Sequence[UpdateStats]) -> dict[str, float]:
    """Return the metrics of a step's updates: means, and for maxima the largest of all updates.

    Args:
        updates: at least one, with `loss` and `entropy`; other quantities are reported if they are there.
    """
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


def _critic(updates: Sequence[UpdateStats], batch: TrainBatch) -> dict[str, float]:
    """Return means over the step's updates; explained_variance = 1 - var(return - value) / var(return), over tokens."""
    if not updates:
        return {}
    values, returns = ([v for row in rows for v in row] for rows in (batch.values, batch.returns))
    variance = statistics.pvariance(returns)
    residual = statistics.pvariance([r - v for r, v in zip(returns, values, strict=True)])
    return {
        "critic/loss": statistics.fmean(u.sums["loss"] for u in updates),
        "critic/clip_fraction": statistics.fmean(u.sums["clip_fraction"] for u in updates),
        "critic/grad_norm": statistics.fmean(u.grad_norm for u in updates),
        "critic/learning_rate": updates[-1].learning_rate,
        "critic/value_mean": statistics.fmean(values),
        "critic/return_mean": statistics.fmean(returns),
        "critic/explained_variance": 1.0 - residual / variance if variance else 0.0,
    }


def _replay(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the fraction of trained tokens without a routing record; nothing if no rollout has a record."""
    if all(r.completion.expert_choices is None for r in rollouts):
        return {}
    num_recorded = 0
    for rollout in rollouts:
        if (choices := rollout.completion.expert_choices) is not None:
            predicting = widen_record(choices[len(rollout.prompt.token_ids) - 1 : rollout.num_tokens - 1])
            has_record = (predicting >= 0).flatten(1).any(1).tolist()
            num_recorded += sum(compress(has_record, rollout.completion.loss_mask or repeat(True)))
    return {"train/unreplayed_fraction": 1.0 - num_recorded / sum(r.completion.num_loss_tokens for r in rollouts)}


def mismatch(rollouts: Sequence[Rollout], old_log_probs: Sequence[Sequence[float]]) -> Mapping[str, float]:
    """Return the mismatch metrics of policy and sampler for the same weights: m = old_log_probs - sampler_log_probs.

    `mismatch_max` = max |m|; `mismatch_likely_max` = the same over the tokens that `guard.max_mismatch` bounds, 0 if
    there are none (mismatch_guard.py); `mismatch_kl` = mean over tokens of exp(m) - m - 1, the k3 estimate of
    KL(sampler || policy), in nats per token, and `mismatch_kl_max` = its largest term. There an m above 40 counts as
    40, so that exp does not overflow.
    """
    differences = [
        old - sampled
        for rollout, olds in zip(rollouts, old_log_probs, strict=True)
        for old, sampled in zip(olds, rollout.completion.loss_log_probs, strict=True)
    ]
    likely = largest_mismatch(rollouts, old_log_probs)
    return {
        "train/mismatch_max": max(abs(m) for m in differences),
        "train/mismatch_likely_max": 0.0 if likely is None else likely.size,
        "train/mismatch_kl_max": max(math.expm1(m) - m for m in (min(m, MAX_REPORTED_LOG_RATIO) for m in differences)),
        "train/mismatch_kl": statistics.fmean(
            math.expm1(m) - m for m in (min(m, MAX_REPORTED_LOG_RATIO) for m in differences)
        ),
    }

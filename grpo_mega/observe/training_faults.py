"""Faults of a training in the last step of its history, which alarms (alarms.py) and the rules of `guard.rules` share.

Each function returns what it found, or None. The default limits are those of the alarms. If the last step lacks the
metric, the fault is not found.
Asserted by tests/unit/observe/test_training_faults.py, and by the tests of both users.
"""

from __future__ import annotations

import statistics

from grpo_mega.observe.alarm_rule import Found
from grpo_mega.observe.history import History, mean

SOLVED = 0.9
"""Accuracy above which equal rewards and a small entropy are the aim and no fault."""
_LEAST_MISMATCH = 1e-3  # nats per token
_WINDOW = 5  # steps of a mean reward


def equal_rewards(history: History, limit: float = 0.98) -> Found | None:
    """At least a fraction `limit` of the groups has equal rewards, although the task is not solved."""
    value, accuracy = history.last("group/degenerate_fraction"), history.last("reward/accuracy")
    if value is None or value < limit or (accuracy is not None and accuracy >= SOLVED):
        return None
    return Found(value, limit, f"the rewards of {value:.0%} of the groups are equal, so the gradient is zero")


def truncated_rollouts(history: History, limit: float = 0.5) -> Found | None:
    """More than a fraction `limit` of the rollouts is truncated."""
    value = history.last("rollout/truncated_fraction")
    if value is None or value <= limit:
        return None
    return Found(value, limit, f"{value:.0%} of the answers reach sampling.max_tokens")


def entropy_collapse(history: History, fraction: float = 0.1) -> Found | None:
    """After 10 steps, the entropy is below `fraction` of the mean of the first 5, although the task is not solved."""
    value, first = history.last("train/entropy"), history.first("train/entropy", 5)
    if value is None or len(history.steps) < 10 or (history.last("reward/accuracy") or 0.0) >= SOLVED:
        return None
    limit = fraction * mean(first)
    if value >= limit:
        return None
    text = f"the entropy is {value:.2g} nats per token, less than {fraction:g} times the {mean(first):.2g} at the start"
    return Found(value, limit, text)


def far_from_reference(history: History, limit: float = 3.0) -> Found | None:
    """The KL divergence from the reference is above `limit` nats per token."""
    value = history.last("train/kl")
    if value is None or value <= limit:
        return None
    return Found(value, limit, f"the KL divergence from the reference is {value:.3g} nats per token")


def gradient_spike(history: History, factor: float = 30.0) -> Found | None:
    """The gradient norm is above `factor` times the median of the 20 steps before, of which at least 10 have one."""
    value, before = history.last("train/grad_norm"), history.recent("train/grad_norm", 20, skip=1)
    if value is None or len(before) < 10:
        return None
    limit = factor * statistics.median(before)
    if value <= limit or limit == 0:
        return None
    text = f"the gradient norm is {value:.3g}, more than {factor:g} times the median of the 20 steps before"
    return Found(value, limit, text)


def mismatch_growth(history: History, factor: float = 10.0) -> Found | None:
    """After 10 steps, policy and engine differ by more than `factor` times the median of the first 10, and by 1e-3."""
    value, first = history.last("train/mismatch_kl"), history.first("train/mismatch_kl", 10)
    if value is None or len(history.steps) < 10:
        return None
    limit = max(_LEAST_MISMATCH, factor * statistics.median(first))
    if abs(value) <= limit:
        return None
    text = f"policy and engine differ by {value:.2g} nats per token, more than {factor:g} times as much as at first"
    return Found(value, limit, text)


def reward_collapse(history: History, fraction: float = 0.5) -> Found | None:
    """After 20 steps, the mean reward of the last 5 is far below the best mean of 5 successive steps.

    Far is `fraction` times the range of the mean rewards of all steps.
    """
    rewards = history.all("reward/mean")
    if len(rewards) < 20 or history.last("reward/mean") is None:
        return None
    sums = [sum(rewards[i : i + _WINDOW]) for i in range(len(rewards) - _WINDOW + 1)]
    best, last = max(sums) / _WINDOW, sums[-1] / _WINDOW
    limit = best - fraction * (max(rewards) - min(rewards))
    if last >= limit:
        return None
    return Found(last, limit, f"the mean reward of 5 steps fell from {best:.3g} to {last:.3g}")

"""The verdict on a run: one sentence that says whether the policy learned, and if not, why.

An accuracy before and after is compared with its statistical error, sqrt(p (1 - p) / n) for n prompts; without held-out
prompts the mean rewards (in supervised fine-tuning, the losses) of the first and the last steps are compared with the
spread of the steps.
Asserted by tests/unit/observe/test_verdict.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpo_mega.observe.history import History, mean

if TYPE_CHECKING:
    from grpo_mega.observe.alarms import Alarm
    from grpo_mega.observe.summary import Evaluation

_FEWEST_STEPS = 5
_UNSTABLE = ("far from the reference", "gradient norm", "mismatch of policy and engine")
_NO_SIGNAL = ("equal rewards", "unscored rollouts", "truncated answers")


def verdict(
    history: History, raised: Sequence[Alarm], before: Evaluation | None, after: Evaluation | None
) -> str | None:
    """Return the sentence, or None after fewer than 5 steps.

    Args:
        history: metrics of all steps.
        raised: alarms of all steps.
        before: held-out evaluation before the first step.
        after: held-out evaluation after the last step.
    """
    if len(history.steps) < _FEWEST_STEPS:
        return None
    active = [alarm for alarm in raised if alarm.until is None]
    for alarm in active:
        if alarm.name in _UNSTABLE:
            return f"unstable since step {alarm.since}: {alarm.text}; look at {alarm.look_at}"
    if before and after:
        change, learned = _accuracy(before, after)
    else:
        change, learned = _trend(history, "mean reward", history.all("reward/mean"), 1.0)
        if not history.all("reward/mean"):  # supervised fine-tuning
            change, learned = _trend(history, "loss", history.all("train/loss"), -1.0)
    if learned:
        return f"learned: {change}"
    reason = next((f"{alarm.text}; look at {alarm.look_at}" for alarm in active if alarm.name in _NO_SIGNAL), "")
    reason = reason or next((f"unstable at step {a.since}: {a.text}" for a in raised if a.name in _UNSTABLE), "")
    return f"did not learn: {change}{f'; {reason}' if reason else ''}"


def _accuracy(before: Evaluation, after: Evaluation) -> tuple[str, bool]:
    variances = [e.accuracy * (1 - e.accuracy) / e.num_prompts for e in (before, after)]
    error = max(math.sqrt(sum(variances)), 0.5 / after.num_prompts)
    gain = after.accuracy - before.accuracy
    change = f"held-out accuracy {before.accuracy:.3f} -> {after.accuracy:.3f}"
    if gain > 2 * error:
        return change, True
    if gain < -2 * error:
        return f"{change}, which is worse", False
    return f"{change}, a change within the statistical error of {after.num_prompts} prompts ({error:.3f})", False


def _trend(history: History, name: str, values: list[float], sign: float) -> tuple[str, bool]:
    """Compare the first and the last fifth of the steps; `sign` is 1 where more is better."""
    if len(values) < _FEWEST_STEPS:
        return f"{len(values)} of {len(history.steps)} steps have a {name}", False
    part = max(2, len(values) // 5)
    first, last = values[:part], values[-part:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / part)
    change = f"{name} {mean(first):.3g} -> {mean(last):.3g} (first and last {part} steps, no held-out prompts)"
    return change, sign * (mean(last) - mean(first)) > max(2 * error, 1e-9)

"""The rule for degenerate groups: groups whose rewards differ by no more than the rounding of their computation.

Weighted sums of the same components can differ in the last bit, as 0.1 + 0.2 and 0.3 do. Such a difference is no
training signal, and division by the std of the group would turn it into one. The advantage estimators, the metrics and
dynamic sampling all use the functions of this module.
Asserted by tests/unit/algorithm/test_degenerate.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDING = 2.0**-40
"""Relative tolerance, about 1e-12: some thousand roundings of float64, and far below one rounding of float32."""


def equal_up_to_rounding(values: Sequence[float]) -> bool:
    """Return True if max(values) - min(values) <= 2^-40 * max(1, max |value|). False if a value is not finite.

    The 1 stands for the size of the summands: a sum that cancels, such as 0.1 + 0.2 - 0.3, is itself no larger than the
    rounding error.

    Args:
        values: at least one.
    """
    if not all(map(math.isfinite, values)):
        return False
    return max(values) - min(values) <= ROUNDING * max(1.0, *map(abs, values))


def equal_groups(rewards: NDArray[np.float64], scored: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Return [P]: True if the outcome rewards of a group are equal up to rounding, or equal as float32.

    Advantages of outcome rewards are computed from float32 (`StepRewards.reward_matrix`): rewards that are equal in
    float32 have advantage 0.

    Args:
        rewards: [P, G], a group per row.
        scored: [P, G], False for entries that are left out; None: none is.
    """
    known = np.ones(rewards.shape, np.bool_) if scored is None else scored
    with np.errstate(over="ignore"):  # a reward beyond the range of float32 is infinite there
        return _equal_rows(rewards, known) | _same_number(rewards.astype(np.float32), known)


def degenerate_groups(
    rewards: NDArray[np.float64], group_size: int, step_values: Sequence[Sequence[float]] | None = None
) -> NDArray[np.bool_]:
    """Return [P]: True if the rewards of a group are equal; for a process reward, if the values of all its steps are.

    Rollouts without a reward are left out. A group with fewer than two rewards is degenerate.

    Args:
        rewards: [P * G] rewards of the rollouts, group by group; NaN for a rollout without a reward.
        group_size: G.
        step_values: the values of each rollout's steps; a rollout without steps counts as one step with its reward.
            None: no rollout has steps.
    """
    matrix = rewards.reshape(-1, group_size)
    scored = ~np.isnan(matrix)
    few = scored.sum(axis=1) < 2
    found = few | equal_groups(matrix, scored)
    if step_values is None:
        return np.asarray(found)
    for group in range(len(matrix)):
        rows = [row for row in range(group * group_size, (group + 1) * group_size) if not math.isnan(rewards[row])]
        if not few[group] and any(len(step_values[row]) for row in rows):
            values = [v for row in rows for v in (step_values[row] if len(step_values[row]) else (rewards[row],))]
            found[group] = equal_up_to_rounding(values)
    return np.asarray(found)


def _equal_rows(matrix: NDArray[Any], scored: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return `equal_up_to_rounding` of the scored entries of each row."""
    finite = np.where(scored, np.isfinite(matrix), True).all(axis=1)
    known = scored & np.isfinite(matrix)
    highest, lowest = np.where(known, matrix, -np.inf).max(axis=1), np.where(known, matrix, np.inf).min(axis=1)
    largest = np.where(known, np.abs(matrix), 0.0).max(axis=1)
    return np.asarray(finite & (highest - lowest <= ROUNDING * np.maximum(1.0, largest)))


def _same_number(matrix: NDArray[np.float32], scored: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return True for each row whose scored entries are the same number."""
    highest, lowest = np.where(scored, matrix, -np.inf).max(axis=1), np.where(scored, matrix, np.inf).min(axis=1)
    return np.asarray(highest == lowest)

"""Selects the groups of a step whose rollouts are written (`observe.rollouts`).

Asserted by tests/unit/observe/rollout_files/test_selection.py.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def sampled_groups(num_groups: int, count: int, *, seed: int, step: int) -> npt.NDArray[np.bool_]:
    """Return [num_groups] bool with `count` True values, or all if there are fewer groups.

    Selected are the groups with the smallest SHA-256 of the text `rollouts SEED STEP GROUP`. The choice is a function
    of (run.seed, step, group), so every rank makes the same one, and a step that is made again writes the same groups.

    Args:
        num_groups: groups of the step, on all ranks together.
        count: groups to select.
        seed: run.seed.
        step: number of the step.
    """
    keys = [hashlib.sha256(f"rollouts {seed} {step} {group}".encode()).digest() for group in range(num_groups)]
    chosen = np.zeros(num_groups, np.bool_)
    chosen[sorted(range(num_groups), key=keys.__getitem__)[:count]] = True
    return chosen

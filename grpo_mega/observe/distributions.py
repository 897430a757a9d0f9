"""Distributions of a step's rollouts, which TensorBoard shows as histograms.

Asserted by tests/unit/observe/test_distributions.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_mega.observe.rollouts import RolloutRow

Array = np.ndarray[Any, np.dtype[np.float64]]


def distributions(rows: Sequence[RolloutRow]) -> dict[str, Array]:
    """Return the finite values of each distribution of HISTOGRAMS in metric_table.py.

    Rewards, advantages and lengths have one value per rollout; the mismatch has one per token that the policy sampled,
    in nats, where the log-probs of the policy are known.
    """
    found = {
        "reward/distribution": np.array([row["reward"] for row in rows], dtype=np.float64),
        "group/advantage_distribution": np.array([row["advantage"] for row in rows], dtype=np.float64),
        "rollout/length_distribution": np.array([len(row["completion_ids"]) for row in rows], dtype=np.float64),
        "train/mismatch_distribution": _mismatch(rows),
    }
    return {name: values[np.isfinite(values)] for name, values in found.items()}


def _mismatch(rows: Sequence[RolloutRow]) -> Array:
    parts = [np.zeros(0)]
    for row in rows:
        if row["old_log_probs"] is not None:
            difference = np.asarray(row["old_log_probs"]) - np.asarray(row["sampler_log_probs"])
            mask = row["loss_mask"]
            parts.append(difference if mask is None else difference[np.asarray(mask, dtype=bool)])
    return np.concatenate(parts)

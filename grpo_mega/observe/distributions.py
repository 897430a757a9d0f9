"""Distributions of the rollouts of a step, which TensorBoard shows as histograms.

Asserted by tests/unit/observe/test_distributions.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from grpo_mega.observe.rollout_files.columns import RaggedColumn, RolloutColumns

Array = np.ndarray[Any, np.dtype[np.float64]]


def distributions(columns: RolloutColumns) -> dict[str, Array]:
    """Return the finite values of each distribution of HISTOGRAMS in metric_table.py.

    Rewards, advantages and lengths have one value per rollout; the mismatch has one per token that the policy sampled,
    in nats, where the log-probs of the policy are known.
    """
    found = {
        "reward/distribution": columns.reward,
        "group/advantage_distribution": columns.advantage,
        "rollout/length_distribution": columns.completion_ids.lengths.astype(np.float64),
        "train/mismatch_distribution": _mismatch(columns),
    }
    return {name: values[np.isfinite(values)] for name, values in found.items()}


def _mismatch(columns: RolloutColumns) -> Array:
    old, lengths = columns.old_log_probs, columns.completion_ids.lengths
    if old is None:
        return np.zeros(0)
    counted = np.repeat(_present(old, len(columns)), lengths)
    sampler = columns.sampler_log_probs.values[counted].astype(np.float64)
    difference = old.values.astype(np.float64) - sampler
    mask = columns.loss_mask
    if mask is None:
        return difference
    trained = np.ones(len(counted), np.bool_)
    trained[np.repeat(_present(mask, len(columns)), lengths)] = mask.values
    return difference[trained[counted]]


def _present(column: RaggedColumn, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.ones(count, np.bool_) if column.present is None else column.present

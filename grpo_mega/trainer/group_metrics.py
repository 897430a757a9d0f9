"""Metrics of the groups of a step and of its distributions, from one number per rollout. Pure.

Asserted by tests/unit/trainer/test_group_metrics.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_mega.rollout.pass_at_k import pass_at_k

Numbers = NDArray[np.floating[Any]]
Flags = NDArray[np.bool_]
_PERCENTILES = (10, 50, 90)


def group_metrics(rewards: Numbers, right: Flags, group_size: int) -> dict[str, float]:
    """Return how the rewards differ within groups, and pass@k of the groups.

    `group/reward_std` is the mean over groups of the standard deviation (divisor G - 1) of their rewards.
    `group/pass_at_k` is the mean over groups of the unbiased estimate 1 - C(n - c, k) / C(n, k) for k = 1, 2, 4, ...
    up to G, with n the rollouts of the group that have a reward and c the right ones. Groups with n < k do not count.

    Args:
        rewards: [R], NaN for a rollout without a reward; groups follow each other.
        right: [R], True for a right answer.
        group_size: G; R is a multiple of it.

    Returns:
        Metrics by name; a mean over no group has no entry.

    Source: pass@k: Chen et al., arXiv:2107.03374, equation 1.
    """
    reward, is_right = rewards.reshape(-1, group_size), right.reshape(-1, group_size)
    scored = ~np.isnan(reward)
    counts, num_right = scored.sum(axis=1), (is_right & scored).sum(axis=1)
    known = counts > 0
    found = {
        "group/all_right_fraction": float(((num_right == counts) & known).mean()),
        "group/all_wrong_fraction": float(((num_right == 0) & known).mean()),
    }
    if (several := counts > 1).any():
        found["group/reward_std"] = float(np.nanstd(reward[several], axis=1, ddof=1).mean())
    codes, repeats = np.unique(counts * (group_size + 1) + num_right, return_counts=True)  # few, of many groups
    num_scored, k = codes // (group_size + 1), 1
    while k <= group_size:
        defined = num_scored >= k
        if defined.any():
            values = [
                pass_at_k(code // (group_size + 1), code % (group_size + 1), k) for code in codes[defined].tolist()
            ]
            found[f"group/pass_at_{k}"] = float(np.average(values, weights=repeats[defined]))
        k *= 2
    return found


def rollout_metrics(rewards: Numbers, right: Flags, lengths: Numbers, group_size: int) -> dict[str, float]:
    """Return the metrics of groups and the percentiles of rewards and completion lengths.

    Args:
        rewards: [R], as in `group_metrics`.
        right: [R], as in `group_metrics`.
        lengths: [R], completion tokens.
        group_size: G.
    """
    return {
        **group_metrics(rewards, right, group_size),
        **percentiles("reward/", rewards),
        **percentiles("rollout/length_", lengths),
    }


def advantage_metrics(advantages: Numbers) -> dict[str, float]:
    """Return the standard deviation (divisor R) and the largest absolute value of the advantages, one per rollout.

    Nothing is returned without advantages.
    """
    if not advantages.size:
        return {}
    return {
        "group/advantage_std": float(advantages.std()),
        "group/advantage_max": float(np.abs(advantages).max()),
    }


def percentiles(prefix: str, values: Numbers) -> dict[str, float]:
    """Return the percentiles 10, 50 and 90 of the values that are not NaN, named `<prefix>p10` and so on.

    Nothing is returned if all are NaN. A percentile between two values is interpolated linearly.
    """
    known = values[~np.isnan(values)]
    if not known.size:
        return {}
    return {f"{prefix}p{p}": float(np.percentile(known, p)) for p in _PERCENTILES}

"""Aggregation modes: the weight of each token's loss in the sum over the update.

A mode is a function of the numbers of loss tokens of *all* rollouts of an update, over all microbatches and ranks. It
returns one weight per rollout, which applies to all of its loss tokens. The weights contain the denominators, so losses
and gradients are only summed, and the result does not depend on the split of the batch. A rollout without loss tokens
(a filtered truncated one) has weight 0, but modes that count rollouts or groups include it.
Asserted by tests/unit/algorithm/test_aggregate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def rollout_mean_weights(num_tokens: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return the weights of the mean over each rollout's tokens, then over N rollouts: w_i = 1 / (num_tokens_i * N).

    Args:
        num_tokens: loss tokens of each rollout of the update.

    Returns:
        One weight per rollout, [N].

    Raises:
        ValueError: a number of tokens is negative.

    Source: DeepSeekMath, arXiv:2402.03300, section "From PPO to GRPO" (1/G sum_i 1/|o_i| sum_t), averaged over prompts.
    """
    counts = _checked(num_tokens)
    return _inverses(counts * len(counts), counts)


def token_mean_weights(num_tokens: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return the weights of the mean over all tokens of the update: w_i = 1 / sum_j num_tokens_j.

    Args:
        num_tokens: loss tokens of each rollout of the update.

    Returns:
        One weight per rollout, [N].

    Raises:
        ValueError: a number of tokens is negative.

    Source: DAPO, arXiv:2503.14476, section "Rebalancing Act: Token-Level Policy Gradient Loss". Differs: the paper
        writes the mean over the tokens of one group; for several groups this is what its authors' code computes.
    """
    counts = _checked(num_tokens)
    return _inverses(np.full(len(counts), counts.sum()), counts)


def rollout_sum_weights(num_tokens: Sequence[int] | NDArray[np.integer[Any]], constant: float) -> NDArray[np.float64]:
    """Return the weights of the sum over each rollout / constant, then the mean over N rollouts: 1 / (constant * N).

    Args:
        num_tokens: loss tokens of each rollout of the update.
        constant: in tokens. Dr. GRPO uses the largest completion length; 1 gives the plain sum.

    Returns:
        One weight per rollout, [N].

    Raises:
        ValueError: the constant is not positive, or a number of tokens is negative.

    Source: Dr. GRPO, arXiv:2503.20783, section "Dr. GRPO: Group Relative Policy Optimization Done Right".
    """
    counts = _checked(num_tokens)
    if not constant > 0:
        raise ValueError(f"constant={constant} must be > 0")
    return _inverses(np.full(len(counts), constant * len(counts)), counts)


def group_token_mean_weights(
    num_tokens: Sequence[int] | NDArray[np.integer[Any]], group_size: int
) -> NDArray[np.float64]:
    """Return the weights of the mean over each group's tokens, then over P groups: 1 / (tokens of the group * P).

    Args:
        num_tokens: loss tokens of each rollout of the update, group by group.
        group_size: rollouts per group.

    Returns:
        One weight per rollout, [N].

    Raises:
        ValueError: the number of rollouts is not a multiple of group_size, or a number of tokens is negative.

    Source: CISPO in MiniMax-M1, arXiv:2506.13585, section "Efficient RL Scaling with CISPO" (1/sum_i |o_i| under the
        expectation over prompts).
    """
    counts = _checked(num_tokens)
    if len(num_tokens) % group_size:
        raise ValueError(f"{len(num_tokens)} rollouts are not a multiple of group_size={group_size}")
    totals = counts.reshape(-1, group_size).sum(axis=1)
    return _inverses(np.repeat(totals * len(totals), group_size), counts)


def _checked(num_tokens: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    counts = np.array(num_tokens, dtype=np.int64)
    if (counts < 0).any():
        rollout = int((counts < 0).argmax())
        raise ValueError(f"rollout {rollout} has {counts[rollout]} loss tokens; the number must be >= 0")
    return counts


def _inverses(denominators: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return 1 / denominator for each rollout with loss tokens, else 0."""
    return np.where(counts > 0, 1.0 / np.maximum(denominators, 1e-300), 0.0)

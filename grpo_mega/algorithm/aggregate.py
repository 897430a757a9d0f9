"""Aggregation modes: the weight of each token's loss in the sum over the update.

A mode is a function of the numbers of loss tokens of *all* rollouts of an update, over all microbatches and ranks. It
returns one weight per rollout, which applies to all of its loss tokens. The weights contain the denominators, so losses
and gradients are only summed, and the result does not depend on the split of the batch. A rollout without loss tokens
(a filtered truncated one) has weight 0, but modes that count rollouts or groups include it.
Asserted by tests/unit/algorithm/test_aggregate.py.
"""

from __future__ import annotations

from collections.abc import Sequence


def rollout_mean_weights(num_tokens: Sequence[int]) -> list[float]:
    """Return the weights of the mean over each rollout's tokens, then over N rollouts: w_i = 1 / (num_tokens_i * N).

    Args:
        num_tokens: loss tokens of each rollout of the update.

    Returns:
        One weight per rollout.

    Raises:
        ValueError: a number of tokens is negative.

    Source: DeepSeekMath, arXiv:2402.03300, section "From PPO to GRPO" (1/G sum_i 1/|o_i| sum_t), averaged over prompts.
    """
    _check(num_tokens)
    return [1.0 / (count * len(num_tokens)) if count else 0.0 for count in num_tokens]


def token_mean_weights(num_tokens: Sequence[int]) -> list[float]:
    """Return the weights of the mean over all tokens of the update: w_i = 1 / sum_j num_tokens_j.

    Args:
        num_tokens: loss tokens of each rollout of the update.

    Returns:
        One weight per rollout.

    Raises:
        ValueError: a number of tokens is negative.

    Source: DAPO, arXiv:2503.14476, section "Rebalancing Act: Token-Level Policy Gradient Loss". Differs: the paper
        writes the mean over the tokens of one group; for several groups this is what its authors' code computes.
    """
    _check(num_tokens)
    total = sum(num_tokens)
    return [1.0 / total if count else 0.0 for count in num_tokens]


def rollout_sum_weights(num_tokens: Sequence[int], constant: float) -> list[float]:
    """Return the weights of the sum over each rollout / constant, then the mean over N rollouts: 1 / (constant * N).

    Args:
        num_tokens: loss tokens of each rollout of the update.
        constant: in tokens. Dr. GRPO uses the largest completion length; 1 gives the plain sum.

    Returns:
        One weight per rollout.

    Raises:
        ValueError: the constant is not positive, or a number of tokens is negative.

    Source: Dr. GRPO, arXiv:2503.20783, section "Dr. GRPO: Group Relative Policy Optimization Done Right".
    """
    _check(num_tokens)
    if not constant > 0:
        raise ValueError(f"constant={constant} must be > 0")
    return [1.0 / (constant * len(num_tokens)) if count else 0.0 for count in num_tokens]


def group_token_mean_weights(num_tokens: Sequence[int], group_size: int) -> list[float]:
    """Return the weights of the mean over each group's tokens, then over P groups: 1 / (tokens of the group * P).

    Args:
        num_tokens: loss tokens of each rollout of the update, group by group.
        group_size: rollouts per group.

    Returns:
        One weight per rollout.

    Raises:
        ValueError: the number of rollouts is not a multiple of group_size, or a number of tokens is negative.

    Source: CISPO in MiniMax-M1, arXiv:2506.13585, section "Efficient RL Scaling with CISPO" (1/sum_i |o_i| under the
        expectation over prompts).
    """
    _check(num_tokens)
    if len(num_tokens) % group_size:
        raise ValueError(f"{len(num_tokens)} rollouts are not a multiple of group_size={group_size}")
    num_groups = len(num_tokens) // group_size
    totals = [sum(num_tokens[i : i + group_size]) for i in range(0, len(num_tokens), group_size)]
    return [1.0 / (totals[i // group_size] * num_groups) if count else 0.0 for i, count in enumerate(num_tokens)]


def _check(num_tokens: Sequence[int]) -> None:
    for rollout, count in enumerate(num_tokens):
        if count < 0:
            raise ValueError(f"rollout {rollout} has {count} loss tokens; the number must be >= 0")

"""Aggregation modes: what each token's loss is multiplied with before everything is added up.

A mode is a function of the numbers of loss tokens of *all* rollouts of an update, over all microbatches and ranks. It
returns one weight per rollout, shared by all of the rollout's loss tokens. Because the weights hold the denominators,
losses and gradients only ever get summed, and the result does not depend on how the batch was split. A rollout without
loss tokens (a truncated one that is filtered) gets 0; where a mode counts rollouts or groups, it still counts.
"""

from __future__ import annotations

from collections.abc import Sequence


def rollout_mean_weights(num_tokens: Sequence[int]) -> list[float]:
    """Mean over each rollout's tokens, then over the N rollouts: w_i = 1 / (num_tokens_i * N).

    Args:
        num_tokens: loss tokens of each rollout of the update.

    Returns:
        One weight per rollout.

    Raises:
        ValueError: a negative number of tokens (in every mode).

    Source: DeepSeekMath, arXiv:2402.03300, section "From PPO to GRPO" (1/G sum_i 1/|o_i| sum_t), averaged over prompts.
    """
    _check(num_tokens)
    return [1.0 / (count * len(num_tokens)) if count else 0.0 for count in num_tokens]


def token_mean_weights(num_tokens: Sequence[int]) -> list[float]:
    """Mean over all tokens of the update: w_i = 1 / sum_j num_tokens_j.

    Source: DAPO, arXiv:2503.14476, section "Rebalancing Act: Token-Level Policy Gradient Loss". Differs: the paper
        writes the mean over the tokens of one group; over several, this is what its authors' code computes.
    """
    _check(num_tokens)
    total = sum(num_tokens)
    return [1.0 / total if count else 0.0 for count in num_tokens]


def rollout_sum_weights(num_tokens: Sequence[int], constant: float) -> list[float]:
    """Sum over each rollout's tokens over a constant, then mean over the N rollouts: w_i = 1 / (constant * N).

    Args:
        num_tokens: loss tokens of each rollout of the update.
        constant: tokens; Dr. GRPO: the most that a completion can have. 1: the plain sum.

    Raises:
        ValueError: a constant that is not positive.

    Source: Dr. GRPO, arXiv:2503.20783, section "Dr. GRPO: Group Relative Policy Optimization Done Right".
    """
    _check(num_tokens)
    if not constant > 0:
        raise ValueError(f"constant={constant}; must be > 0")
    return [1.0 / (constant * len(num_tokens)) if count else 0.0 for count in num_tokens]


def group_token_mean_weights(num_tokens: Sequence[int], group_size: int) -> list[float]:
    """Mean over each group's tokens, then over the P groups: w_i = 1 / (tokens of i's group * P).

    Args:
        num_tokens: loss tokens of each rollout of the update, one group after the other.
        group_size: rollouts of a group.

    Raises:
        ValueError: not a whole number of groups.

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
            raise ValueError(f"rollout {rollout} has {count} loss tokens; must be >= 0")

"""Aggregation modes: what each token's loss is multiplied with before everything is added up.

A mode is a function of the numbers of loss tokens per rollout and of *global* counts of the update. It returns one
weight per rollout, shared by all of the rollout's loss tokens. Because the weights hold the denominators, losses and
gradients only ever get summed, over microbatches and ranks, and the result does not depend on how the batch was split.
"""

from __future__ import annotations

from collections.abc import Sequence


def rollout_mean_weights(num_tokens: Sequence[int], num_rollouts: int) -> list[float]:
    """Mean over each rollout's tokens, then over the rollouts: w_i = 1 / (num_tokens_i * num_rollouts).

    Args:
        num_tokens: loss tokens of each rollout at hand (any part of the update).
        num_rollouts: rollouts of the whole update, over all microbatches and ranks.

    Returns:
        The weight of every loss token of rollout i. A rollout without loss tokens gets 0 and still counts in
        `num_rollouts`.

    Raises:
        ValueError: a negative number of tokens, or more rollouts at hand than the update has.

    Source: DeepSeekMath, arXiv:2402.03300, equation 3 (1/G sum_i 1/|o_i| sum_t), averaged over prompts.
    """
    if len(num_tokens) > num_rollouts:
        raise ValueError(
            f"num_rollouts={num_rollouts} is less than the {len(num_tokens)} rollouts at hand; count all ranks"
        )
    for rollout, count in enumerate(num_tokens):
        if count < 0:
            raise ValueError(f"rollout {rollout} has {count} loss tokens; must be >= 0")
    return [1.0 / (count * num_rollouts) if count else 0.0 for count in num_tokens]

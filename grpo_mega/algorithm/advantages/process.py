"""Advantages from the steps that a process reward judged (process supervision)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, compress

import torch

from grpo_mega.algorithm.base import Estimates, StepRewards, advantage
from grpo_mega.algorithm.degenerate import equal_up_to_rounding


@advantage
def process(step: StepRewards) -> Estimates:
    """Return one number per loss token: the normalized values of the steps that end with or after the token.

    A rollout without steps counts as one step, which ends with its completion and has the value of its reward. A
    rollout without a reward has no steps.

    Raises:
        ValueError: a step does not end within its rollout, or a value is not finite.

    Source: see `process_advantages`.
    """
    lengths = [len(r.completion.token_ids) for r in step.rollouts]
    steps = [
        () if not has else rollout.steps if rollout.steps is not None else ((length - 1, reward),)
        for rollout, length, reward, has in zip(step.rollouts, lengths, step.rewards, step.scored, strict=True)
    ]
    rows = process_advantages(steps, lengths, step.group_size)
    masks = [r.completion.loss_mask for r in step.rollouts]
    return Estimates([row if m is None else list(compress(row, m)) for row, m in zip(rows, masks, strict=True)])


def process_advantages(
    steps: Sequence[Sequence[tuple[int, float]]], lengths: Sequence[int], group_size: int, eps: float = 1e-6
) -> list[list[float]]:
    """Return A_t = sum over the steps j of the rollout with index(j) >= t of (r_j - mean(R)) / (std(R) + eps).

    R are the values of all steps of all rollouts of the group. The std divides by n - 1, as in `group_advantages`.

    Args:
        steps: (end_token, value) of each rollout's steps, in any order, groups in order.
        lengths: completion tokens of each rollout.
        group_size: rollouts of a group.
        eps: keeps the quotient finite; it must be small compared with differences of values.

    Returns:
        One list per rollout, one number per completion token; all zero in a group whose values are equal up to rounding
        (algorithm/degenerate.py).

    Raises:
        ValueError: a step does not end within its rollout, or a value is not finite.

    Source: DeepSeekMath, arXiv:2402.03300, section "Process Supervision RL with GRPO".
    """
    found: list[list[float]] = []
    for begin in range(0, len(steps), group_size):
        group = steps[begin : begin + group_size]
        values = torch.tensor([value for row in group for _, value in row], dtype=torch.float64)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"the value of a step of rollouts {begin} to {begin + group_size - 1} is not finite")
        mean, std = float(values.mean()) if len(values) else 0.0, 0.0
        if len(values) > 1 and not equal_up_to_rounding(values.tolist()):
            std = float(values.std(correction=1))
        for row, length in zip(group, lengths[begin : begin + group_size], strict=True):
            gains = [0.0] * length
            for end, value in row:
                if not 0 <= end < length:
                    raise ValueError(f"a step ends at token {end} of a completion of {length} tokens")
                gains[end] += (value - mean) / (std + eps) if std else 0.0
            found.append(list(accumulate(reversed(gains)))[::-1])
    return found

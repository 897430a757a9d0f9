"""Advantages from the steps that a process reward judged (process supervision)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

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
    assert step.completion_tokens is not None, "the trainer gives the lengths"
    lengths, rewards, judged = step.completion_tokens.tolist(), step.reward_array.tolist(), step.steps
    steps = [
        []
        if not has
        else judged.of(i)
        if judged is not None and judged.has_steps[i]
        else [(lengths[i] - 1, rewards[i])]
        for i, has in enumerate(step.scored.tolist())
    ]
    gains = process_gains(steps, lengths, step.group_size)
    if step.own is None:
        return Estimates(np.zeros(len(rewards)))
    positions = step.own.positions
    rows = [
        later_gains(gains[i], lengths[i])[positions.values[begin:end]]
        for i, begin, end in zip(
            positions.ids.tolist(), positions.offsets[:-1].tolist(), positions.offsets[1:].tolist(), strict=True
        )
    ]
    return Estimates(positions.with_values(np.concatenate([np.zeros(0), *rows])))


def process_gains(
    steps: Sequence[Sequence[tuple[int, float]]], lengths: Sequence[int], group_size: int, eps: float = 1e-6
) -> list[list[tuple[int, float]]]:
    """Return (end_token, (r_j - mean(R)) / (std(R) + eps)) of each step j of each rollout.

    R are the values of all steps of all rollouts of the group. The std divides by n - 1, as in `group_advantages`.

    Args:
        steps: (end_token, value) of each rollout's steps, in any order, groups in order.
        lengths: completion tokens of each rollout.
        group_size: rollouts of a group.
        eps: keeps the quotient finite; it must be small compared with differences of values.

    Returns:
        One list per rollout; all numbers are 0 in a group whose values are equal up to rounding
        (algorithm/degenerate.py).

    Raises:
        ValueError: a step does not end within its rollout, or a value is not finite.

    Source: DeepSeekMath, arXiv:2402.03300, section "Process Supervision RL with GRPO".
    """
    found: list[list[tuple[int, float]]] = []
    for begin in range(0, len(steps), group_size):
        group = steps[begin : begin + group_size]
        values = torch.tensor([value for row in group for _, value in row], dtype=torch.float64)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"the value of a step of rollouts {begin} to {begin + group_size - 1} is not finite")
        mean, std = float(values.mean()) if len(values) else 0.0, 0.0
        if len(values) > 1 and not equal_up_to_rounding(values.tolist()):
            std = float(values.std(correction=1))
        for row, length in zip(group, lengths[begin : begin + group_size], strict=True):
            for end, _ in row:
                if not 0 <= end < length:
                    raise ValueError(f"a step ends at token {end} of a completion of {length} tokens")
            found.append([(end, (value - mean) / (std + eps) if std else 0.0) for end, value in row])
    return found


def later_gains(gains: Sequence[tuple[int, float]], length: int) -> NDArray[np.float64]:
    """Return A_t = sum of the gains of the steps that end at or after token t, [length].

    Source: see `process_gains`.
    """
    found = np.zeros(length)
    if gains:
        np.add.at(found, [end for end, _ in gains], [gain for _, gain in gains])
    return np.cumsum(found[::-1])[::-1]

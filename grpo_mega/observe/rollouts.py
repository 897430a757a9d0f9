"""Writes `rollouts/step_000012.jsonl`: one row per rollout, with all data that a replay of the step needs.

Asserted by tests/unit/observe/test_rollouts.py.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from grpo_mega.observe.atomic_files import to_json, write_atomically
from grpo_mega.types import Rollout, StopReason


class RolloutRow(TypedDict):
    """One line of the file.

    Log-probs have one entry per token of `completion_ids`, 0 for tokens that an environment wrote. `old_log_probs` is
    None where they are not known (`algorithm.old_log_probs=sampler`). `loss_mask` is 1 for tokens that the policy
    sampled and 0 for tokens of an environment; None: the policy sampled all tokens. `steps` has (end_token,
    value) of each step of a process reward. `reward` is None for a rollout that could not be scored and was left out of
    the loss; `reward_failures` names the terms that failed.
    """

    prompt: str
    completion: str
    answer: str
    reward: float | None
    reward_components: dict[str, float]
    reward_failures: list[str]
    advantage: float
    stop_reason: StopReason
    policy_version: int
    prompt_index: int
    replica: int
    prompt_ids: list[int]
    completion_ids: list[int]
    sampler_log_probs: list[float]
    old_log_probs: list[float] | None
    loss_mask: list[int] | None
    num_turns: int
    steps: list[tuple[int, float]] | None
    data_set: str


def rollout_rows(
    rollouts: Sequence[Rollout], advantages: Sequence[float], old_log_probs: Sequence[Sequence[float] | None] | None
) -> list[RolloutRow]:
    """Return one row per rollout, in order.

    Args:
        rollouts: rollouts of a step.
        advantages: one per rollout.
        old_log_probs: one list per rollout with an entry per token that the policy sampled; None where not known.

    Raises:
        ValueError: lengths differ.
    """
    olds = [None] * len(rollouts) if old_log_probs is None else old_log_probs
    return [_row(r, advantage, old) for r, advantage, old in zip(rollouts, advantages, olds, strict=True)]


def _row(rollout: Rollout, advantage: float, old_log_probs: Sequence[float] | None) -> RolloutRow:
    prompt, completion = rollout.prompt, rollout.completion
    num_tokens, mask = len(completion.token_ids), completion.loss_mask
    for name, values, expected in (
        ("sampler_log_probs", completion.sampler_log_probs, num_tokens),
        ("old_log_probs", old_log_probs, completion.num_loss_tokens),
    ):
        if values is not None and len(values) != expected:
            raise ValueError(
                f"{name} of a rollout of prompt {prompt.index} has {len(values)} entries for "
                f"{expected} completion tokens; it must have one per token"
            )
    old = None if old_log_probs is None else iter(old_log_probs)
    return RolloutRow(
        prompt=prompt.text,
        completion=completion.text,
        answer=prompt.answer,
        reward=rollout.reward.value,
        reward_components=dict(rollout.reward.components),
        reward_failures=list(rollout.reward.failures),
        advantage=float(advantage),
        stop_reason=completion.stop_reason,
        policy_version=completion.policy_version,
        prompt_index=prompt.index,
        replica=rollout.replica,
        prompt_ids=list(prompt.token_ids),
        completion_ids=list(completion.token_ids),
        sampler_log_probs=list(completion.sampler_log_probs),
        old_log_probs=None
        if old is None
        else [float(next(old)) if own else 0.0 for own in mask or (True,) * num_tokens],
        loss_mask=None if mask is None else [int(own) for own in mask],
        num_turns=completion.num_turns,
        steps=None if rollout.steps is None else list(rollout.steps),
        data_set=prompt.data_set,
    )


def write_experts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write the routing records of the rollouts to an .npz file, atomically. No file if no rollout has a record.

    The file has `choices` [sum of num_tokens, L, K], the records of the rollouts in order (data/expert_records.py), and
    `num_tokens`, one per row.
    """
    records = [r.completion.expert_choices for r in rollouts]
    known = [record.numpy() for record in records if record is not None]
    if known:
        counts = np.array([0 if record is None else len(record) for record in records], dtype=np.int32)
        data = io.BytesIO()
        np.savez(data, choices=np.concatenate(known), num_tokens=counts)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data.getvalue())


def write_rollouts(path: Path, rows: Sequence[RolloutRow]) -> None:
    """Write one JSON object per line, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{to_json(row)}\n" for row in rows))

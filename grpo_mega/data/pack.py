"""Packing of several rollouts into a row of T tokens.

Labels are shifted inside each rollout, so no token predicts a token of the next rollout. The loss mask is built from
lengths and from the source of each token (policy or environment), never from the padding token. There is no loop over
tokens or rollouts.
Asserted by tests/unit/data/test_pack.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grpo_mega.data.expert_records import widen_record
from grpo_mega.data.rollout_tokens import RolloutTokens, offsets_of, ragged_index
from grpo_mega.data.rollout_values import LossTokenValues, values_of
from grpo_mega.types import Microbatch, TokenValues


def pack(
    rollouts: RolloutTokens,
    *,
    row_tokens: int,
    advantages: NDArray[Any],
    token_weights: NDArray[Any],
    pad_id: int,
    segment_multiple: int = 1,
) -> Microbatch:
    """Concatenate rollouts in a row, one segment per rollout; the rest of the row is a padding segment.

    Args:
        rollouts: N rollouts, in the order of their segments; none gives a row without a loss token.
        row_tokens: T, the length of the row.
        advantages: one number per loss token (a completion's token that the policy sampled), rollout by rollout.
        token_weights: [N], for each loss token of the rollout.
        pad_id: token id of the padding.
        segment_multiple: every segment is padded to a multiple of it. Attention is causal, so no token attends to the
            padding after it.

    Raises:
        ValueError: the rollouts have more than `row_tokens` tokens.
    """
    lengths = rollouts.lengths
    segments = -(-lengths // segment_multiple) * segment_multiple
    total = int(segments.sum())
    if total > row_tokens:
        raise ValueError(f"{len(rollouts)} rollouts of {total} tokens in all do not fit a row of {row_tokens}")
    bounds = offsets_of(segments)
    if total < row_tokens:
        bounds = np.append(bounds, row_tokens)
    # One more position than the row has: position t predicts token t + 1.
    token_ids, is_sampled = np.full(row_tokens + 1, pad_id, np.int64), np.zeros(row_tokens + 1, np.bool_)
    token_mask = np.zeros(row_tokens, np.bool_)
    floats = [np.zeros(row_tokens, np.float32) for _ in range(3)]
    places: slice | NDArray[np.int64] = slice(0, total)  # of all tokens in the row
    if not np.array_equal(segments, lengths):
        places = ragged_index(bounds[: len(lengths)], lengths)
    token_ids[places], token_mask[places] = rollouts.token_ids, True
    labels = token_ids[1:].copy()
    labels[bounds[1:-1] - 1] = pad_id  # the last position of a segment does not predict the next segment
    # The first completion token belongs to the last prompt position.
    is_sampled[places] = rollouts.loss_mask
    loss_mask = is_sampled[1:].copy()
    weights = np.repeat(np.asarray(token_weights, np.float32), rollouts.loss_counts)
    for row, values in zip(floats, (advantages, weights, rollouts.sampler_log_probs[rollouts.loss_mask]), strict=True):
        row[loss_mask] = values
    position_ids = np.arange(row_tokens) - np.repeat(bounds[:-1], np.diff(bounds))
    row_advantages, row_weights, sampler_log_probs = floats
    return Microbatch(
        rollout_ids=tuple(rollouts.ids.tolist()),
        token_ids=torch.from_numpy(token_ids[:-1]),
        position_ids=torch.from_numpy(position_ids),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        advantages=torch.from_numpy(row_advantages),
        token_weights=torch.from_numpy(row_weights),
        sampler_log_probs=torch.from_numpy(sampler_log_probs),
        expert_choices=_expert_choices(rollouts, places, row_tokens),
        token_mask=torch.from_numpy(token_mask),
    )


def unpack(values: Sequence[Tensor], microbatches: Sequence[Microbatch]) -> TokenValues:
    """Return the values of the loss tokens of all rollouts of the microbatches.

    Args:
        values: one tensor [T] per microbatch, on any device.
        microbatches: rows of different rollouts.
    """
    ids: list[int] = []
    counts, found = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for row, microbatch in zip(values, microbatches, strict=True):
        mask = microbatch.loss_mask
        running = np.concatenate([[0], np.cumsum(mask.numpy(), dtype=np.int64)])
        # There are fewer rollouts than segments when the last segment is padding.
        counts.append(np.diff(running[microbatch.cu_seqlens.numpy()])[: len(microbatch.rollout_ids)])
        found.append(row.detach().cpu()[mask].float().numpy())
        ids += microbatch.rollout_ids
    every, sizes, unsorted = np.concatenate(found), np.concatenate(counts), np.array(ids, dtype=np.int64)
    order = np.argsort(unsorted, kind="stable")
    starts = offsets_of(sizes)[:-1]
    return TokenValues(unsorted[order], offsets_of(sizes[order]), every[ragged_index(starts[order], sizes[order])])


def token_row(values: LossTokenValues, microbatch: Microbatch) -> Tensor:
    """Return [T] float32 with the values on the loss tokens of the microbatch, and 0 elsewhere.

    `values` must have the rollouts of the microbatch, and may have others.
    """
    row = torch.zeros(len(microbatch.loss_mask))
    found = values_of(values, np.array(microbatch.rollout_ids, dtype=np.int64))
    row[microbatch.loss_mask] = torch.from_numpy(found.astype(np.float32))
    return row


def _expert_choices(rollouts: RolloutTokens, places: slice | NDArray[np.int64], row_tokens: int) -> Tensor | None:
    """Return the routing record [T, L, K] of a row, -1 without a record; None if the step has no records."""
    if rollouts.expert_choices is None:
        return None
    row = torch.full((row_tokens, *rollouts.expert_choices.shape[1:]), -1, dtype=torch.int16)
    row.numpy()[places] = widen_record(torch.from_numpy(rollouts.expert_choices)).numpy()
    return row

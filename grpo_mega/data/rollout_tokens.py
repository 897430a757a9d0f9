"""Tokens of rollouts as ragged columns: one array per column, in which rollouts follow each other.

A rank holds the columns of the rollouts that it sampled, and later of the rollouts that it trains on; no rank holds
those of the whole step. Nothing here is a Python object per token.
Asserted by tests/unit/data/test_rollout_tokens.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grpo_mega.data.expert_records import NO_RECORD_UINT8
from grpo_mega.types import Rollout, TokenValues

NOT_SAMPLED = -1
"""Policy version of the tokens that no policy sampled: prompts and results of environments."""
_LONG_RANGE = 64
"""Mean number of entries from which on ranges are handled one by one, without an array of 8 bytes per entry."""


@dataclass(frozen=True)
class RolloutTokens:
    """Prompt and completion tokens of N rollouts, T tokens in all.

    Rollout `ids[i]` (a row of the step's table) has the entries `offsets[i] : offsets[i + 1]` of every column, of which
    the first `prompt_tokens[i]` are its prompt.

    Attributes:
        ids: [N] int64, ascending.
        offsets: [N + 1] int64, starts with 0.
        prompt_tokens: [N] int64.
        token_ids: [T] int32.
        sampler_log_probs: [T] float32, nats; 0 where `loss_mask` is False.
        loss_mask: [T] bool, True for the tokens that the policy sampled.
        policy_versions: [T] int32, number of updates behind the weights that sampled the token; NOT_SAMPLED elsewhere.
        expert_choices: [T, L, K] routing record (data/expert_records.py); None if no rollout of the step has one.
    """

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    sampler_log_probs: NDArray[np.float32]
    loss_mask: NDArray[np.bool_]
    policy_versions: NDArray[np.int32]
    expert_choices: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each rollout, prompt plus completion, [N]."""
        return np.diff(self.offsets)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(column.nbytes for column in vars(self).values() if column is not None)

    @property
    def completion_tokens(self) -> NDArray[np.int64]:
        """Tokens of each completion, [N]."""
        return self.lengths - self.prompt_tokens

    @property
    def loss_counts(self) -> NDArray[np.int64]:
        """Loss tokens of each rollout, [N]."""
        if len(self.loss_mask) >= _LONG_RANGE * len(self):  # reduceat converts the whole mask to int64
            bounds = zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)
            return np.array([np.count_nonzero(self.loss_mask[begin:end]) for begin, end in bounds], dtype=np.int64)
        counts = np.zeros(len(self), np.int64)
        is_filled = self.lengths > 0
        if is_filled.any():  # reduceat has no empty segments
            counts[is_filled] = np.add.reduceat(self.loss_mask, self.offsets[:-1][is_filled], dtype=np.int64)
        return counts

    @property
    def loss_positions(self) -> NDArray[np.int32]:
        """Position of each loss token in the completion of its rollout, [number of loss tokens]."""
        starts = (self.offsets[:-1] + self.prompt_tokens).tolist()
        bounds = zip(starts, self.offsets[1:].tolist(), strict=True)
        found, filled = np.empty(np.count_nonzero(self.loss_mask), np.int32), 0
        for begin, end in bounds:
            positions = np.flatnonzero(self.loss_mask[begin:end])
            found[filled : filled + len(positions)] = positions
            filled += len(positions)
        return found

    def on_loss_tokens(self, column: NDArray[Any]) -> TokenValues:
        """Return the entries of a column [T] at the loss tokens."""
        return TokenValues(self.ids, offsets_of(self.loss_counts), column[self.loss_mask])

    def of_prompts(self, column: NDArray[Any]) -> NDArray[Any]:
        """Return the entries of a column [T] at the tokens of prompts."""
        return join_ranges(column, self.offsets[:-1], self.offsets[:-1] + self.prompt_tokens)

    def of_completions(self, column: NDArray[Any]) -> NDArray[Any]:
        """Return the entries of a column [T] at the tokens of completions."""
        return join_ranges(column, self.offsets[:-1] + self.prompt_tokens, self.offsets[1:])

    def select(self, places: NDArray[np.int64] | NDArray[np.bool_]) -> RolloutTokens:
        """Return the rollouts at these places 0..N-1 (or a mask of N), in this order. Columns are copied."""
        places = np.arange(len(self))[places]
        begins, ends = self.offsets[:-1][places], self.offsets[1:][places]
        experts = self.expert_choices
        return RolloutTokens(
            self.ids[places],
            offsets_of(ends - begins),
            self.prompt_tokens[places],
            join_ranges(self.token_ids, begins, ends),
            join_ranges(self.sampler_log_probs, begins, ends),
            join_ranges(self.loss_mask, begins, ends),
            join_ranges(self.policy_versions, begins, ends),
            None if experts is None else join_ranges(experts, begins, ends),
        )

    def with_ids(self, ids: NDArray[np.int64]) -> RolloutTokens:
        """Return the same rollouts under other numbers, in ascending order of these."""
        return replace(self, ids=ids).select(np.argsort(ids, kind="stable"))

    @classmethod
    def of(cls, rollouts: Sequence[tuple[int, Rollout]]) -> RolloutTokens:
        """Build the columns from (id, rollout), in ascending order of the ids.

        Raises:
            ValueError: a routing record has more tokens than its rollout.
        """
        prompts = [np.asarray(r.prompt.token_ids, dtype=np.int32) for _, r in rollouts]
        completions = [r.completion for _, r in rollouts]
        prompt_tokens = np.array([len(p) for p in prompts], dtype=np.int64)
        pairs = list(zip(prompts, completions, strict=True))
        lengths = np.array([len(p) + len(c.token_ids) for p, c in pairs], dtype=np.int64)
        mask = _concatenate(
            [
                part
                for p, c in pairs
                for part in (
                    np.zeros(len(p), bool),
                    np.ones(len(c.token_ids), bool) if c.loss_mask is None else c.loss_mask,
                )
            ],
            np.bool_,
        )
        log_probs = _concatenate(
            [part for p, c in pairs for part in (np.zeros(len(p), np.float32), c.sampler_log_probs)], np.float32
        )
        not_sampled = ~mask
        np.copyto(log_probs, np.float32(0), where=not_sampled)
        versions = np.repeat(np.array([c.policy_version for c in completions], dtype=np.int32), lengths)
        for end, completion in zip(offsets_of(lengths)[1:].tolist(), completions, strict=True):
            if completion.policy_versions is not None:
                versions[end - len(completion.token_ids) : end] = completion.policy_versions
        np.copyto(versions, np.int32(NOT_SAMPLED), where=not_sampled)
        return cls(
            np.array([i for i, _ in rollouts], dtype=np.int64),
            offsets_of(lengths),
            prompt_tokens,
            _concatenate([part for p, c in pairs for part in (p, c.token_ids)], np.int32),
            log_probs,
            mask,
            versions,
            _expert_choices([r for _, r in rollouts]),
        )

    @classmethod
    def empty(cls) -> RolloutTokens:
        """Return the columns of no rollouts."""
        return cls.of(())

    @classmethod
    def concatenate(cls, parts: Sequence[RolloutTokens]) -> RolloutTokens:
        """Return the rollouts of all parts, in ascending order of their ids."""
        records = [part.expert_choices for part in parts if part.expert_choices is not None]
        experts = None
        if records:
            filled = [
                no_record((len(part.token_ids), *records[0].shape[1:]), records[0].dtype)
                if part.expert_choices is None
                else part.expert_choices
                for part in parts
            ]
            experts = np.concatenate(filled)
        whole = cls(
            np.concatenate([part.ids for part in parts]),
            offsets_of(np.concatenate([part.lengths for part in parts])),
            np.concatenate([part.prompt_tokens for part in parts]),
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.sampler_log_probs for part in parts]),
            np.concatenate([part.loss_mask for part in parts]),
            np.concatenate([part.policy_versions for part in parts]),
            experts,
        )
        return whole.with_ids(whole.ids)


def offsets_of(counts: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return [0, n_0, n_0 + n_1, ...], [N + 1] int64."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def ragged_index(starts: NDArray[np.integer[Any]], counts: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return starts[0], starts[0] + 1, ... (counts[0] numbers), then those from starts[1] on, and so on."""
    shifts = np.asarray(starts, dtype=np.int64) - offsets_of(counts)[:-1]
    return np.repeat(shifts, counts) + np.arange(int(np.sum(counts)), dtype=np.int64)


def join_ranges(column: NDArray[Any], begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[Any]:
    """Return the entries `begins[0] : ends[0]`, then `begins[1] : ends[1]`, and so on.

    Long ranges are copied as a whole, without an array of indices, which has 8 bytes per entry.
    """
    counts = ends - begins
    if counts.sum() < _LONG_RANGE * len(counts):
        return np.asarray(column[ragged_index(begins, counts)])
    return np.concatenate([column[:0], *(column[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True))])


def sums_per_rollout(values: TokenValues) -> NDArray[np.float64]:
    """Return the sum over the loss tokens of each rollout, [N] float64; 0 for a rollout without loss tokens."""
    return _reduce(np.add, values)


def means_per_rollout(values: TokenValues) -> NDArray[np.float64]:
    """Return the mean over the loss tokens of each rollout, [N] float64; 0 for a rollout without loss tokens.

    The mean of equal numbers is exactly this number.
    """
    highest, lowest = _reduce(np.maximum, values), _reduce(np.minimum, values)
    return np.where(highest == lowest, highest, _reduce(np.add, values) / np.maximum(values.counts, 1))


def _reduce(operation: np.ufunc, values: TokenValues) -> NDArray[np.float64]:
    numbers = np.append(values.values.astype(np.float64), 0.0)  # for rollouts without loss tokens at the end
    if not len(values.ids):
        return np.zeros(0)
    return np.where(values.counts > 0, operation.reduceat(numbers, values.offsets[:-1]), 0.0)


def no_record(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return a routing record of this shape whose tokens have no record."""
    return np.full(shape, NO_RECORD_UINT8 if dtype == np.uint8 else -1, dtype=dtype)


def _concatenate(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype=dtype)


def _expert_choices(rollouts: Sequence[Rollout]) -> NDArray[Any] | None:
    records = [r.completion.expert_choices for r in rollouts]
    known = [record for record in records if record is not None]
    if not known:
        return None
    dtype = torch.zeros(0, dtype=known[0].dtype).numpy().dtype
    lengths = np.array([r.num_tokens for r in rollouts], dtype=np.int64)
    column = no_record((int(lengths.sum()), *known[0].shape[1:]), dtype)
    for begin, rollout, record in zip(offsets_of(lengths).tolist(), rollouts, records, strict=False):
        if record is not None:
            if len(record) > rollout.num_tokens:
                raise ValueError(f"expert choices of {len(record)} tokens for a rollout of {rollout.num_tokens}")
            column[begin : begin + len(record)] = record.numpy()
    return column

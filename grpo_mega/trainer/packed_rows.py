"""Rows of one rank that are packed when they are read, so that at most the row in use has memory of its own.

A row is a pure function of the columns: reading it again gives equal tensors. What is computed per row afterwards, such
as log-probs, is kept and added to each row that is read.
Asserted by tests/unit/trainer/test_packed_rows.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grpo_mega.data.pack import pack, token_row
from grpo_mega.data.rollout_tokens import RolloutTokens
from grpo_mega.data.rollout_values import LossTokenValues, values_of
from grpo_mega.types import Microbatch, TokenValues

_PAD_ID = 0  # any valid token id: positions of padding have no loss and attend to nothing


@dataclass(frozen=True, eq=False)
class PackedRows(Sequence[Microbatch]):
    """Microbatches of one rank.

    Attributes:
        ids: rollouts of each row, rows of the step's table, in the order of the segments.
        tokens: of all rollouts of the rows, and maybe of others.
        advantages: of their loss tokens.
        token_weights: [R] factor of the loss of each token of each rollout of the step.
        row_tokens: T, the length of every row.
        segment_multiple: every segment is padded to a multiple of it.
        old_values: with a critic, its values of the loss tokens.
        returns: with a critic, its targets.
        old_log_probs: one [T] tensor per row; None (also an entry): not known.
        ref_log_probs: likewise.
    """

    ids: Sequence[NDArray[np.int64]]
    tokens: RolloutTokens
    advantages: LossTokenValues
    token_weights: NDArray[np.float64]
    row_tokens: int
    segment_multiple: int
    old_values: TokenValues | None = None
    returns: TokenValues | None = None
    old_log_probs: Sequence[Tensor | None] | None = None
    ref_log_probs: Sequence[Tensor | None] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Microbatch: ...

    @overload
    def __getitem__(self, index: slice) -> PackedRows: ...

    def __getitem__(self, index: int | slice) -> Microbatch | PackedRows:
        if isinstance(index, slice):
            old, ref = self.old_log_probs, self.ref_log_probs
            return replace(
                self,
                ids=self.ids[index],
                old_log_probs=None if old is None else old[index],
                ref_log_probs=None if ref is None else ref[index],
            )
        places = np.searchsorted(self.tokens.ids, self.ids[index])
        row = pack(
            self.tokens.select(places),
            row_tokens=self.row_tokens,
            advantages=values_of(self.advantages, self.ids[index]),
            token_weights=self.token_weights[self.ids[index]],
            pad_id=_PAD_ID,
            segment_multiple=self.segment_multiple,
        )
        return replace(
            row,
            old_log_probs=None if self.old_log_probs is None else self.old_log_probs[index],
            ref_log_probs=None if self.ref_log_probs is None else self.ref_log_probs[index],
            old_values=None if self.old_values is None else token_row(self.old_values, row),
            returns=None if self.returns is None else token_row(self.returns, row),
        )

    @property
    def rollout_ids(self) -> list[tuple[int, ...]]:
        """`Microbatch.rollout_ids` of each row; no row is packed."""
        return [tuple(ids.tolist()) for ids in self.ids]

    def has_old_log_probs(self, row: int) -> bool:
        """Return True if the row at this index has log-probs from before the update; no row is packed."""
        return self.old_log_probs is not None and self.old_log_probs[row] is not None

    def with_log_probs(self, *, old: Sequence[Tensor | None] | None, ref: Sequence[Tensor] | None) -> PackedRows:
        """Return the rows with log-probs: one [T] tensor per row; None (also an entry of `old`): unchanged."""
        found = self.old_log_probs
        if old is not None:
            before = found or [None] * len(self)
            found = [kept if row is None else row for row, kept in zip(old, before, strict=True)]
        assert ref is None or len(ref) == len(self), f"{len(self)} rows have {len(ref or ())} rows of log-probs"
        return replace(self, old_log_probs=found, ref_log_probs=self.ref_log_probs if ref is None else ref)

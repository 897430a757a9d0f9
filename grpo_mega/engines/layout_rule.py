"""The layout of every rank of an engine from those of four: a rule fitted to three of them, asserted on the fourth.

Ranks of one engine copy the same things in the same order; only numbers differ: where a slice starts and ends, and
which expert it is of. Each such number is `base + step * (rank // period)` (a period above 1: ranks that share a KV
head), at most the size of its dimension (the padded vocabulary). Pure.
Asserted by tests/unit/test_layout_rule.py; on every rank of a recorded engine by tests/engine/test_vllm_record.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from grpo_mega.types import TensorSlice

Ints = NDArray[np.int64]
_NUMBER = re.compile(r"\d+")


class NoRuleError(RuntimeError):
    """The recorded ranks follow no such rule; every rank has to be recorded."""


def sampled_ranks(num_ranks: int) -> list[int]:
    """All of a few ranks; of many the first, the last and two in between, the third of which checks the rule."""
    if num_ranks <= 8:
        return list(range(num_ranks))
    return [0, num_ranks // 3, 2 * num_ranks // 3 + 1, num_ranks - 1]


def layouts_of_all(
    recorded: Mapping[int, Sequence[TensorSlice]], shapes: Mapping[str, tuple[int, ...]], num_ranks: int
) -> list[list[TensorSlice]]:
    """The slices of each rank.

    Args:
        recorded: rank -> its slices, in the order in which the loader copied them; of `sampled_ranks`.
        shapes: of the tensors of the checkpoint.
        num_ranks: of the engine.

    Raises:
        NoRuleError: no rule fits (names a slice).
    """
    if len(recorded) == num_ranks:
        return [list(recorded[rank]) for rank in range(num_ranks)]
    ranks = sorted(recorded)
    fitted = [ranks[0], ranks[1], ranks[3]]
    tables = {rank: _Table.of(recorded[rank], shapes) for rank in ranks}
    rule = _Rule.fit([tables[rank] for rank in fitted], fitted, num_ranks)
    check = ranks[2]
    predicted = rule.slices(check)
    for found, expected in zip(recorded[check], predicted, strict=True):
        if found != expected:
            raise NoRuleError(f"rank {check} of the engine takes {found}, the rule of ranks {fitted} says {expected}")
    return [list(recorded[rank]) if rank in recorded else rule.slices(rank) for rank in range(num_ranks)]


class _Table:
    """Slices as words and numbers: [slices, numbers in the name + starts + ends], and the largest value of each."""

    def __init__(self, words: list[tuple[str, ...]], dims: list[int], numbers: Ints, limits: Ints) -> None:
        self.words, self.dims, self.numbers, self.limits = words, dims, numbers, limits

    @classmethod
    def of(cls, slices: Sequence[TensorSlice], shapes: Mapping[str, tuple[int, ...]]) -> _Table:
        words, dims, rows, limits = [], [], [], []
        width = max(len(_NUMBER.findall(s.name)) + 2 * len(s.shape) for s in slices)
        for each in slices:
            names = [int(n) for n in _NUMBER.findall(each.name)]
            ends = [o + n for o, n in zip(each.offsets, each.shape, strict=True)]
            pad = [0] * (width - len(names) - 2 * len(ends))
            words.append(tuple(_NUMBER.split(each.name)))
            dims.append(len(ends))
            rows.append([*names, *each.offsets, *ends, *pad])
            limits.append([1 << 62] * len(names) + list(shapes[each.name]) * 2 + pad)
        return cls(words, dims, np.asarray(rows, np.int64), np.asarray(limits, np.int64))


class _Rule:
    """base + step * (rank // period), at most limit; all of them [slices, numbers]."""

    def __init__(self, table: _Table, base: Ints, step: Ints, period: Ints) -> None:
        self._table, self._base, self._step, self._period = table, base, step, period

    @classmethod
    def fit(cls, tables: Sequence[_Table], ranks: Sequence[int], num_ranks: int) -> _Rule:
        first, middle, last = tables
        if any(t.words != first.words for t in tables):
            raise NoRuleError(f"ranks {list(ranks)} of the engine copy different tensors, or in another order")
        base = first.numbers
        step, period = np.zeros_like(base), np.zeros(len(base), np.int64)
        for p in [p for p in range(1, num_ranks + 1) if num_ranks % p == 0]:
            turns = (np.asarray(ranks) // p).tolist()
            if not turns[1]:
                continue
            candidate = (middle.numbers - base) // turns[1]
            values = [np.minimum(base + candidate * turn, first.limits) for turn in turns]
            # all numbers of a slice follow one period: its end alone may fit a wrong one, cut at the tensor's size
            fits = ((values[1] == middle.numbers) & (values[2] == last.numbers)).all(1) & (period == 0)
            step[fits], period[fits] = candidate[fits], p
        if not period.all():
            row = int(np.flatnonzero(period == 0)[0])
            name = "0".join(first.words[row])
            raise NoRuleError(f"where {name} (or its like) lies on ranks {list(ranks)} of the engine follows no rule")
        return cls(first, base, step, period)

    def slices(self, rank: int) -> list[TensorSlice]:
        values = np.minimum(self._base + self._step * (rank // self._period[:, None]), self._table.limits).tolist()
        found = []
        for words, dims, numbers in zip(self._table.words, self._table.dims, values, strict=True):
            names = numbers[: len(words) - 1]
            name = words[0] + "".join(f"{n}{word}" for n, word in zip(names, words[1:], strict=True))
            starts = numbers[len(names) : len(names) + dims]
            ends = numbers[len(names) + dims : len(names) + 2 * dims]
            found.append(TensorSlice(name, tuple(starts), tuple(e - s for s, e in zip(starts, ends, strict=True))))
        return found

"""Derivation of the layouts of all ranks of an engine from four recorded ones: fitted to three, checked on the fourth.

All ranks of an engine copy the same tensors in the same order. Only numbers differ: the start and end of a slice, and
the number of an expert. Each number is `base + step * (r // period)`, limited to the size of its dimension (for the
padded vocabulary). The period is above 1 where ranks share a KV head. `r` is the rank or, where data-parallel ranks
hold copies, the rank within its copy, `rank % tp`. All functions are pure.
Asserted by tests/unit/engines/vllm/test_layout_extrapolation.py; on every rank of a recorded engine by
tests/engine/test_vllm_record.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grpo_mega.types import TensorSlice

Ints = NDArray[np.int64]
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class RankLayout:
    """The slices of one rank as arrays.

    Slice i is `starts[i] : ends[i]` of tensor `names[i]`, which has `dims[i]` dimensions; further columns are [0:1].
    `starts` and `ends` have the shape [slices, D].
    """

    names: Sequence[str]
    dims: Ints
    starts: Ints
    ends: Ints

    @classmethod
    def of(cls, slices: Sequence[TensorSlice]) -> RankLayout:
        """Return the layout that consists of these slices."""
        dims = [len(each.shape) for each in slices]
        starts, ends = np.zeros((len(slices), max(dims)), np.int64), np.ones((len(slices), max(dims)), np.int64)
        for i, (each, width) in enumerate(zip(slices, dims, strict=True)):
            starts[i, :width] = each.offsets
            ends[i, :width] = [o + n for o, n in zip(each.offsets, each.shape, strict=True)]
        return cls([each.name for each in slices], np.asarray(dims, np.int64), starts, ends)

    def slices(self) -> list[TensorSlice]:
        """Return the slices as a list."""
        columns = zip(
            self.names, self.dims.tolist(), self.starts.tolist(), (self.ends - self.starts).tolist(), strict=True
        )
        return [TensorSlice(name, tuple(start[:width]), tuple(shape[:width])) for name, width, start, shape in columns]


class NoRuleError(RuntimeError):
    """The recorded ranks do not follow such a rule, so every rank must be recorded."""


def sampled_ranks(num_ranks: int, tp: int | None = None) -> list[int]:
    """Return the ranks to record: all of up to 8 ranks, else the first, the last and two in between.

    The third of the four checks the rule. `tp` is the number of ranks of one copy, if there are several. The second
    rank is then in the first copy: no other choice decides, for every number of ranks, between the rank and the rank
    within its copy.
    """
    if num_ranks <= 8:
        return list(range(num_ranks))
    if tp is None or tp in (1, num_ranks):
        return [0, num_ranks // 3, 2 * num_ranks // 3 + 1, num_ranks - 1]
    return [0, tp // 2, num_ranks // tp // 2 * tp + 3 * tp // 4, num_ranks - 1]


def layouts_of_all(
    recorded: Mapping[int, Sequence[TensorSlice]],
    shapes: Mapping[str, tuple[int, ...]],
    num_ranks: int,
    tp: int | None = None,
) -> Iterator[RankLayout]:
    """Yield the layout of each rank in rank order.

    Args:
        recorded: rank -> slices in the order of the loader, for `sampled_ranks`.
        shapes: name -> shape of every tensor of the checkpoint.
        num_ranks: ranks of the engine.
        tp: ranks of one copy; None: there is one copy.

    Raises:
        NoRuleError: no rule fits (names a slice).
    """
    if len(recorded) == num_ranks:
        return (RankLayout.of(recorded[rank]) for rank in range(num_ranks))
    ranks = sorted(recorded)
    fitted = [ranks[0], ranks[1], ranks[3]]
    rule = _Rule.fit([_Table.of(recorded[rank], shapes) for rank in fitted], fitted, num_ranks, tp or num_ranks)
    check = ranks[2]
    for found, expected in zip(recorded[check], rule.layout(check).slices(), strict=True):
        if found != expected:
            raise NoRuleError(
                f"rank {check} of the engine holds {found}, but the rule of ranks {fitted} gives {expected}"
            )
    return (RankLayout.of(recorded[rank]) if rank in recorded else rule.layout(rank) for rank in range(num_ranks))


class _Table:
    """Slices as words and numbers [slices, numbers in the name + starts + ends], with the limit of each number."""

    def __init__(self, words: list[tuple[str, ...]], layout: RankLayout, numbers: Ints, limits: Ints) -> None:
        self.words, self.layout, self.numbers, self.limits = words, layout, numbers, limits

    @classmethod
    def of(cls, slices: Sequence[TensorSlice], shapes: Mapping[str, tuple[int, ...]]) -> _Table:
        layout = RankLayout.of(slices)
        found = [[int(n) for n in _NUMBER.findall(name)] for name in layout.names]
        width, dims = max(map(len, found)), layout.starts.shape[1]
        names = np.asarray([numbers + [0] * (width - len(numbers)) for numbers in found], np.int64)
        sizes = np.asarray([[*shapes[name], *[1] * (dims - len(shapes[name]))] for name in layout.names], np.int64)
        return cls(
            [tuple(_NUMBER.split(name)) for name in layout.names],
            layout,
            np.hstack([names, layout.starts, layout.ends]),
            np.hstack([np.full_like(names, 1 << 62), sizes, sizes]),
        )


class _Rule:
    """The rule min(base + step * (rank % modulus // period), limit); all arrays are [slices, numbers]."""

    def __init__(self, table: _Table, base: Ints, step: Ints, period: Ints, modulus: Ints) -> None:
        self._table, self._base, self._step, self._period, self._modulus = table, base, step, period, modulus

    @classmethod
    def fit(cls, tables: Sequence[_Table], ranks: Sequence[int], num_ranks: int, tp: int) -> _Rule:
        first, middle, last = tables
        if any(t.words != first.words for t in tables):
            raise NoRuleError(f"ranks {list(ranks)} of the engine copy different tensors or use another order")
        base = first.numbers
        step, period, modulus = np.zeros_like(base), np.zeros(len(base), np.int64), np.ones(len(base), np.int64)
        of = dict.fromkeys((num_ranks, tp))
        for m, p in [(size, p) for size in of for p in range(1, size + 1) if size % p == 0]:
            positions = (np.asarray(ranks) % m // p).tolist()
            if not positions[1]:
                continue
            candidate = (middle.numbers - base) // positions[1]
            values = [np.minimum(base + candidate * position, first.limits) for position in positions]
            # All numbers of a slice must fit one period: its end alone may fit a wrong one, limited by the size.
            fits = ((values[1] == middle.numbers) & (values[2] == last.numbers)).all(1) & (period == 0)
            step[fits], period[fits], modulus[fits] = candidate[fits], p, m
        if not period.all():
            row = int(np.flatnonzero(period == 0)[0])
            name = "0".join(first.words[row])
            raise NoRuleError(
                f"the slices of {name} (or of a similar tensor) on ranks {list(ranks)} of the engine follow no rule"
            )
        return cls(first, base, step, period, modulus)

    def layout(self, rank: int) -> RankLayout:
        """Return the layout of a rank."""
        positions = rank % self._modulus // self._period
        values = np.minimum(self._base + self._step * positions[:, None], self._table.limits)
        like, dims = self._table.layout, self._table.layout.starts.shape[1]
        names, starts, ends = values[:, : -2 * dims], values[:, -2 * dims : -dims], values[:, -dims:]
        if not self._step[:, : -2 * dims].any():
            return RankLayout(like.names, like.dims, starts, ends)
        found = []
        for words, numbers in zip(self._table.words, names.tolist(), strict=True):
            found.append(words[0] + "".join(f"{n}{w}" for n, w in zip(numbers, words[1:], strict=False)))
        return RankLayout(found, like.dims, starts, ends)

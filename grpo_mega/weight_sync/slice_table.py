"""Slices of named tensors as columns of numbers, so that a plan for thousands of ranks is computed with numpy.

A `RankSliceTable` lists which slice of which tensor is on which ranks; each end of a sync is one such table. Ranks with
the same slice share a row, so replicas of a job add no rows. Slices have `DIMS` dimensions; a tensor with fewer
dimensions is padded with `[0:1]` at the end.

Pure functions. Asserted by tests/unit/weight_sync/test_plan.py and tests/unit/weight_sync/test_slice_table.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grpo_mega.types import TensorSlice

DIMS = 4
Ints = NDArray[np.int64]
RankSet = tuple[int, ...]


@dataclass(frozen=True)
class SentTensor:
    """Shape of a checkpoint tensor, and bytes per element of the dtype in which it is sent."""

    shape: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True)
class SliceTable:
    """Row i is the slice `starts[i] : ends[i]` of tensor number `tensors[i]`.

    `tensors`: [N]; `starts`, `ends`: [N, DIMS].
    """

    tensors: Ints
    starts: Ints
    ends: Ints

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(frozen=True)
class RankSliceTable(SliceTable):
    """A slice table with ranks: slice i is on every rank of `rank_sets[rank_set[i]]`, which is sorted.

    `rank_set`: [N].
    """

    rank_set: Ints
    rank_sets: tuple[RankSet, ...]

    def placed_on(self, ranks: Sequence[int]) -> RankSliceTable:
        """Return the same slices, each on all of `ranks`, without the ranks of this table."""
        here = (tuple(sorted(ranks)),)
        return RankSliceTable(self.tensors, self.starts, self.ends, np.zeros(len(self), np.int64), here)

    def select(self, index: NDArray[np.bool_] | Ints) -> RankSliceTable:
        """Return the rows that `index` selects: [N] bool, or [n] numbers of rows."""
        return RankSliceTable(
            self.tensors[index], self.starts[index], self.ends[index], self.rank_set[index], self.rank_sets
        )

    def rows_on(self, ranks: Iterable[int]) -> RankSliceTable:
        """Return the rows that are on at least one of `ranks`."""
        wanted = frozenset(ranks)
        return self.select(np.asarray([not wanted.isdisjoint(each) for each in self.rank_sets], bool)[self.rank_set])

    def lowest_rank(self, row: int) -> int:
        """Return the lowest rank that has the slice of this row (used in messages)."""
        return self.rank_sets[int(self.rank_set[row])][0]


def tensor_numbers(tensors: Iterable[str]) -> dict[str, int]:
    """Return name -> number of each tensor, in checkpoint order."""
    return {name: i for i, name in enumerate(tensors)}


def table_of_rank(
    tensors: Mapping[str, SentTensor],
    slices: Iterable[TensorSlice],
    rank: int,
    numbers: Mapping[str, int] | None = None,
) -> RankSliceTable:
    """Return the table of one rank's slices.

    Args:
        tensors: every tensor, in checkpoint order.
        slices: of this rank.
        rank: the rank.
        numbers: `tensor_numbers(tensors)`, for callers with many ranks.

    Raises:
        ValueError: a slice is of an unknown tensor, or exceeds its tensor.
    """
    numbers = tensor_numbers(tensors) if numbers is None else numbers
    found, starts, ends = [], [], []
    for each in slices:
        if each.name not in numbers:
            raise ValueError(f"{each} on rank {rank}: the policy does not have this tensor")
        whole = tensors[each.name].shape
        stops = tuple(o + n for o, n in zip(each.offsets, each.shape, strict=True))
        if len(whole) != len(stops) or any(stop > size for stop, size in zip(stops, whole, strict=True)):
            raise ValueError(f"{each} on rank {rank} exceeds the tensor's shape {list(whole)}")
        padding = DIMS - len(stops)
        found.append(numbers[each.name])
        starts.append((*each.offsets, *(0,) * padding))
        ends.append((*stops, *(1,) * padding))
    rows = [np.asarray(columns, np.int64).reshape(-1, DIMS) for columns in (starts, ends)]
    return table_from_columns(np.asarray(found, np.int64), rows[0], rows[1], (rank,))


def table_from_columns(numbers: Ints, starts: Ints, ends: Ints, ranks: RankSet) -> RankSliceTable:
    """Return a table of N slices, each of which is on all of `ranks`.

    Args:
        numbers: [N] number of the tensor.
        starts: [N, at most DIMS] first index in each dimension.
        ends: [N, at most DIMS] end of the slice in each dimension.
        ranks: sorted.
    """
    padding = ((0, 0), (0, DIMS - starts.shape[1]))
    starts, ends = np.pad(starts, padding), np.pad(ends, padding, constant_values=1)
    return RankSliceTable(numbers, starts, ends, np.zeros(len(numbers), np.int64), (ranks,))


def concatenate(parts: Sequence[RankSliceTable]) -> RankSliceTable:
    """Return the rows of all tables, in order."""
    numbers: dict[RankSet, int] = {}
    sets = []
    for part in parts:
        positions = [numbers.setdefault(ranks, len(numbers)) for ranks in part.rank_sets]
        sets.append(np.asarray(positions, np.int64)[part.rank_set])
    return RankSliceTable(
        np.concatenate([p.tensors for p in parts]),
        np.concatenate([p.starts for p in parts]),
        np.concatenate([p.ends for p in parts]),
        np.concatenate(sets),
        tuple(numbers),
    )


def num_elements(starts: Ints, ends: Ints) -> Ints:
    """Return the number of elements of each slice: [N]."""
    product: Ints = (ends - starts).prod(1)
    return product


def merge_equal_slices(table: RankSliceTable) -> RankSliceTable:
    """Return a table with one row per distinct slice, on all ranks that have the slice.

    Rows are sorted by tensor, start and end. No two entries of `rank_sets` are equal.
    """
    order = np.lexsort((*table.ends.T[::-1], *table.starts.T[::-1], table.tensors))
    rows = table.select(order)
    first = np.ones(len(rows), bool)
    for column in (rows.tensors[:, None], rows.starts, rows.ends):
        first[1:] &= (column[1:] == column[:-1]).all(1)
    first[1:] = ~first[1:]
    begin = np.flatnonzero(first)
    numbers: dict[RankSet, int] = {}
    merged_sets: dict[tuple[int, ...], int] = {}
    found, sets = [], rows.rank_set.tolist()
    for low, high in itertools.pairwise([*begin.tolist(), len(rows)]):
        key = tuple(sets[low:high])
        if key not in merged_sets:
            ranks = tuple(sorted({rank for each in key for rank in table.rank_sets[each]}))
            merged_sets[key] = numbers.setdefault(ranks, len(numbers))
        found.append(merged_sets[key])
    return RankSliceTable(
        rows.tensors[begin], rows.starts[begin], rows.ends[begin], np.asarray(found, np.int64), tuple(numbers)
    )


def overlaps(left: SliceTable, right: SliceTable) -> tuple[Ints, Ints, Ints, Ints]:
    """Return all pairs of slices that share an element.

    Returns:
        For each of the n pairs: row of `left` [n], row of `right` [n], starts and ends of the overlap [n, DIMS].
    """
    order = np.argsort(right.tensors, kind="stable")
    sorted_tensors = right.tensors[order]
    begin = np.searchsorted(sorted_tensors, left.tensors, "left")
    count = np.searchsorted(sorted_tensors, left.tensors, "right") - begin
    i = np.repeat(np.arange(len(left)), count)
    j = order[expand_ranges(begin, count)]
    starts = np.maximum(left.starts[i], right.starts[j])
    ends = np.minimum(left.ends[i], right.ends[j])
    shared = (starts < ends).all(1)
    return i[shared], j[shared], starts[shared], ends[shared]


def expand_ranges(begin: Ints, count: Ints) -> Ints:
    """Return the concatenation over i of begin[i], begin[i] + 1, ..., begin[i] + count[i] - 1."""
    total = int(count.sum())
    before = np.repeat(np.cumsum(count) - count, count)
    return np.repeat(begin, count) + np.arange(total) - before


def as_slice(
    names: Sequence[str], tensors: Mapping[str, SentTensor], tensor: int, start: Ints, end: Ints
) -> TensorSlice:
    """Return a row as a `TensorSlice` with the tensor's own number of dimensions.

    Args:
        names: of all tensors, by number.
        tensors: name -> tensor.
        tensor: number of the row's tensor.
        start: [DIMS] first index in each dimension.
        end: [DIMS] end of the slice in each dimension.
    """
    name = names[tensor]
    dims = len(tensors[name].shape)
    offsets = tuple(int(x) for x in start[:dims])
    return TensorSlice(name, offsets, tuple(int(e) - o for e, o in zip(end[:dims], offsets, strict=True)))


def split_slice(
    start: Sequence[int], end: Sequence[int], max_elements: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (start, end) of disjoint parts of at most `max_elements`, in order, that fill the slice.

    The slice is split along its first dimension longer than 1, recursively.
    """
    size = [e - s for s, e in zip(start, end, strict=True)]
    total = int(np.prod(size))
    if total <= max_elements:
        yield tuple(start), tuple(end)
        return
    axis = next(i for i, n in enumerate(size) if n > 1)
    step = max(1, max_elements // (total // size[axis]))
    for at in range(start[axis], end[axis], step):
        low, high = list(start), list(end)
        low[axis], high[axis] = at, min(at + step, end[axis])
        yield from split_slice(low, high, max_elements)

"""Boxes of named tensors as columns of numbers: what a plan computes with, for thousands of ranks at once.

A `Holdings` lists which box of which tensor lies on which ranks; both ends of a sync are one. Ranks with the same box
share a row, so a job's replicas cost nothing. Boxes have `DIMS` dimensions; those that a tensor lacks are `[0:1]` at
the end. Pure; asserted by tests/unit/weight_sync/test_plan.py and tests/unit/weight_sync/test_slice_table.py.
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
class WireTensor:
    """A tensor of the checkpoint as it travels."""

    shape: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True)
class Boxes:
    """Row i: the box `starts[i] : ends[i]` of tensor number `tensors[i]`.

    `tensors`: [N]; `starts`, `ends`: [N, DIMS].
    """

    tensors: Ints
    starts: Ints
    ends: Ints

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(frozen=True)
class Holdings(Boxes):
    """Box i is on every rank of `rank_sets[rank_set[i]]`, which is sorted. `rank_set`: [N]."""

    rank_set: Ints
    rank_sets: tuple[RankSet, ...]

    def on(self, ranks: Sequence[int]) -> Holdings:
        """The same boxes on each of `ranks`, whatever ranks they are on here."""
        here = (tuple(sorted(ranks)),)
        return Holdings(self.tensors, self.starts, self.ends, np.zeros(len(self), np.int64), here)

    def rows(self, index: NDArray[np.bool_] | Ints) -> Holdings:
        """Some of the rows."""
        return Holdings(self.tensors[index], self.starts[index], self.ends[index], self.rank_set[index], self.rank_sets)

    def of(self, ranks: Iterable[int]) -> Holdings:
        """The rows that lie on at least one of `ranks`."""
        wanted = frozenset(ranks)
        return self.rows(np.asarray([not wanted.isdisjoint(each) for each in self.rank_sets], bool)[self.rank_set])

    def a_rank_of(self, row: int) -> int:
        """For messages: the lowest rank that has this box."""
        return self.rank_sets[int(self.rank_set[row])][0]


def numbering(tensors: Iterable[str]) -> dict[str, int]:
    """Name -> number of each tensor, in checkpoint order."""
    return {name: i for i, name in enumerate(tensors)}


def holdings(
    tensors: Mapping[str, WireTensor],
    slices: Iterable[TensorSlice],
    rank: int,
    numbers: Mapping[str, int] | None = None,
) -> Holdings:
    """The slices of one rank; `numbers` is `numbering(tensors)`, for callers with many ranks.

    Raises:
        ValueError: a slice of an unknown tensor, or one that leaves its tensor.
    """
    numbers = numbering(tensors) if numbers is None else numbers
    found, starts, ends = [], [], []
    for each in slices:
        if each.name not in numbers:
            raise ValueError(f"{each} on rank {rank} is a slice of no tensor of the policy")
        whole = tensors[each.name].shape
        stops = tuple(o + n for o, n in zip(each.offsets, each.shape, strict=True))
        if len(whole) != len(stops) or any(stop > size for stop, size in zip(stops, whole, strict=True)):
            raise ValueError(f"{each} on rank {rank} leaves its tensor of shape {list(whole)}")
        tail = DIMS - len(stops)
        found.append(numbers[each.name])
        starts.append((*each.offsets, *(0,) * tail))
        ends.append((*stops, *(1,) * tail))
    rows = [np.asarray(columns, np.int64).reshape(-1, DIMS) for columns in (starts, ends)]
    return of_columns(np.asarray(found, np.int64), rows[0], rows[1], (rank,))


def of_columns(numbers: Ints, starts: Ints, ends: Ints, ranks: RankSet) -> Holdings:
    """Boxes `starts` : `ends` ([N, at most DIMS]) of tensors `numbers` ([N]), on each of `ranks`."""
    lacking = ((0, 0), (0, DIMS - starts.shape[1]))
    starts, ends = np.pad(starts, lacking), np.pad(ends, lacking, constant_values=1)
    return Holdings(numbers, starts, ends, np.zeros(len(numbers), np.int64), (ranks,))


def join(parts: Sequence[Holdings]) -> Holdings:
    """One after the other."""
    numbers: dict[RankSet, int] = {}
    sets = []
    for part in parts:
        places = [numbers.setdefault(ranks, len(numbers)) for ranks in part.rank_sets]
        sets.append(np.asarray(places, np.int64)[part.rank_set])
    return Holdings(
        np.concatenate([p.tensors for p in parts]),
        np.concatenate([p.starts for p in parts]),
        np.concatenate([p.ends for p in parts]),
        np.concatenate(sets),
        tuple(numbers),
    )


def volumes(starts: Ints, ends: Ints) -> Ints:
    """Elements of each box."""
    product: Ints = (ends - starts).prod(1)
    return product


def merged(held: Holdings) -> Holdings:
    """Each box once, on all ranks that have it, sorted by tensor, start and end; equal sets of ranks are one."""
    order = np.lexsort((*held.ends.T[::-1], *held.starts.T[::-1], held.tensors))
    rows = held.rows(order)
    first = np.ones(len(rows), bool)
    for column in (rows.tensors[:, None], rows.starts, rows.ends):
        first[1:] &= (column[1:] == column[:-1]).all(1)
    first[1:] = ~first[1:]
    begin = np.flatnonzero(first)
    numbers: dict[RankSet, int] = {}
    of_sets: dict[tuple[int, ...], int] = {}
    found, sets = [], rows.rank_set.tolist()
    for low, high in itertools.pairwise([*begin.tolist(), len(rows)]):
        key = tuple(sets[low:high])
        if key not in of_sets:
            ranks = tuple(sorted({rank for each in key for rank in held.rank_sets[each]}))
            of_sets[key] = numbers.setdefault(ranks, len(numbers))
        found.append(of_sets[key])
    return Holdings(
        rows.tensors[begin], rows.starts[begin], rows.ends[begin], np.asarray(found, np.int64), tuple(numbers)
    )


def overlaps(left: Boxes, right: Boxes) -> tuple[Ints, Ints, Ints, Ints]:
    """All pairs of boxes that share an element: (row of left, row of right, starts, ends of what they share)."""
    order = np.argsort(right.tensors, kind="stable")
    sorted_tensors = right.tensors[order]
    begin = np.searchsorted(sorted_tensors, left.tensors, "left")
    count = np.searchsorted(sorted_tensors, left.tensors, "right") - begin
    i = np.repeat(np.arange(len(left)), count)
    j = order[expand(begin, count)]
    starts = np.maximum(left.starts[i], right.starts[j])
    ends = np.minimum(left.ends[i], right.ends[j])
    shared = (starts < ends).all(1)
    return i[shared], j[shared], starts[shared], ends[shared]


def expand(begin: Ints, count: Ints) -> Ints:
    """begin[i], begin[i] + 1, ..., begin[i] + count[i] - 1, for one i after the other."""
    total = int(count.sum())
    before = np.repeat(np.cumsum(count) - count, count)
    return np.repeat(begin, count) + np.arange(total) - before


def as_slice(
    names: Sequence[str], tensors: Mapping[str, WireTensor], tensor: int, start: Ints, end: Ints
) -> TensorSlice:
    """A row as a slice of its tensor's own dimensions."""
    name = names[tensor]
    dims = len(tensors[name].shape)
    offsets = tuple(int(x) for x in start[:dims])
    return TensorSlice(name, offsets, tuple(int(e) - o for e, o in zip(end[:dims], offsets, strict=True)))


def cut(
    start: Sequence[int], end: Sequence[int], max_elements: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A box as boxes of at most `max_elements`, in order: cut along its first dimension that is longer than 1."""
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
        yield from cut(low, high, max_elements)

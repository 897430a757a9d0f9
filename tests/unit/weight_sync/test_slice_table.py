"""Slice tables: a row shared by many ranks is equivalent to one row per rank."""

from __future__ import annotations

import random

from grpo_mega.types import TensorSlice
from grpo_mega.weight_sync.slice_table import RankSliceTable, SentTensor, concatenate, merge_equal_slices, table_of_rank

TENSORS = {"a": SentTensor((8, 4), 2), "b": SentTensor((6,), 4)}
SLICES = [TensorSlice("a", (i, 0), (2, 4)) for i in (0, 2, 4)] + [TensorSlice("a", (0, 0), (4, 4))]
SLICES += [TensorSlice("b", (i,), (3,)) for i in (0, 3)]


def as_pairs(held: RankSliceTable) -> set[tuple[int, tuple[int, ...], tuple[int, ...], int]]:
    return {
        (int(held.tensors[i]), tuple(held.starts[i].tolist()), tuple(held.ends[i].tolist()), rank)
        for i in range(len(held))
        for rank in held.rank_sets[int(held.rank_set[i])]
    }


def test_merged_rows_list_each_slice_once_in_order_with_all_its_ranks() -> None:
    choose = random.Random(0)
    for _ in range(50):
        on = {rank: choose.sample(SLICES, choose.randint(0, 6)) for rank in range(5)}
        rows = concatenate([table_of_rank(TENSORS, slices, rank) for rank, slices in on.items()])
        found = merge_equal_slices(concatenate([rows, rows]))
        assert as_pairs(found) == as_pairs(rows)
        keys = [(int(found.tensors[i]), *found.starts[i].tolist(), *found.ends[i].tolist()) for i in range(len(found))]
        assert keys == sorted(set(keys))
        assert len(set(found.rank_sets)) == len(found.rank_sets)
        assert all(list(ranks) == sorted(set(ranks)) for ranks in found.rank_sets)


def test_rows_on_some_ranks_are_the_rows_on_at_least_one_of_them() -> None:
    rows = concatenate(
        [table_of_rank(TENSORS, SLICES[:2], 0).placed_on([1, 3]), table_of_rank(TENSORS, SLICES[2:], 0).placed_on([2])]
    )
    assert as_pairs(rows.rows_on([3])) == as_pairs(table_of_rank(TENSORS, SLICES[:2], 0).placed_on([1, 3]))
    assert len(rows.rows_on([0])) == 0
    assert len(rows.rows_on([2, 3])) == len(SLICES)
    assert rows.lowest_rank(0) == 1

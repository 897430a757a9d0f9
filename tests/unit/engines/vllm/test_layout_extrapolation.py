"""The layouts of all ranks are derived from four recorded ones."""

from __future__ import annotations

import pytest

from grpo_mega.engines.vllm.layout_extrapolation import NoRuleError, RankLayout, layouts_of_all, sampled_ranks
from grpo_mega.types import TensorSlice

SHAPES = {"q": (128, 4), "k": (32, 4), "norm": (4,), "embed": (121, 4)} | {f"experts.{e}": (6, 4) for e in range(64)}


def rank_of_16(rank: int) -> list[TensorSlice]:
    """Rows of q, a KV head that four ranks share, a norm, a padded vocabulary, four experts."""
    rows = min(8, 121 - 8 * rank)
    return [
        TensorSlice("q", (8 * rank, 0), (8, 4)),
        TensorSlice("k", (8 * (rank // 4), 0), (8, 4)),
        TensorSlice("norm", (0,), (4,)),
        TensorSlice("embed", (8 * rank, 0), (rows, 4)),
        *(TensorSlice(f"experts.{4 * rank + i}", (0, 0), (6, 4)) for i in range(4)),
    ]


def test_columns_shared_heads_padding_and_experts_are_derived_from_four_ranks() -> None:
    recorded = {rank: rank_of_16(rank) for rank in sampled_ranks(16)}
    assert len(recorded) == 4
    assert [each.slices() for each in layouts_of_all(recorded, SHAPES, 16)] == [rank_of_16(rank) for rank in range(16)]


def rank_with_copies(rank: int, tp: int) -> list[TensorSlice]:
    """Attention and vocabulary split over the tp ranks of each copy, two KV heads, two experts on each of 32 ranks."""
    at, rows = rank % tp, 128 // tp
    return [
        TensorSlice("q", (rows * at, 0), (rows, 4)),
        TensorSlice("k", (16 * (at // (tp // 2)) if tp > 1 else 0, 0), (16, 4)),
        TensorSlice("norm", (0,), (4,)),
        TensorSlice("embed", (rows * at, 0), (min(rows, 121 - rows * at), 4)),
        *(TensorSlice(f"experts.{2 * rank + i}", (0, 0), (6, 4)) for i in range(2)),
    ]


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_copies_of_the_attention_and_whole_experts_are_derived_from_four_ranks(tp: int) -> None:
    ranks = sampled_ranks(32, tp)
    assert (len(set(ranks)), ranks == sorted(ranks)) == (4, True)
    recorded = {rank: rank_with_copies(rank, tp) for rank in ranks}
    found = [each.slices() for each in layouts_of_all(recorded, SHAPES, 32, tp)]
    assert found == [rank_with_copies(rank, tp) for rank in range(32)]


@pytest.mark.parametrize("num_ranks", range(9, 65))
def test_the_rank_and_the_rank_within_a_copy_are_distinguished(num_ranks: int) -> None:
    def rows(rank: int, tp: int) -> list[TensorSlice]:
        return [TensorSlice("a", (rank % tp,), (1,)), TensorSlice("a", (rank,), (1,))]

    for tp in [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]:
        recorded = {rank: rows(rank, tp) for rank in sampled_ranks(num_ranks, tp)}
        found = layouts_of_all(recorded, {"a": (64,)}, num_ranks, tp)
        assert [each.slices() for each in found] == [rows(rank, tp) for rank in range(num_ranks)], tp


def test_a_layout_lists_its_slices() -> None:
    layout = RankLayout.of(rank_of_16(3))
    assert layout.slices() == rank_of_16(3)
    assert (layout.starts[2].tolist(), layout.ends[2].tolist()) == ([0, 0], [4, 1])


def test_up_to_eight_ranks_are_all_recorded() -> None:
    assert sampled_ranks(8) == list(range(8))
    recorded = {rank: rank_of_16(rank) for rank in range(8)}
    assert [each.slices() for each in layouts_of_all(recorded, SHAPES, 8)] == [rank_of_16(rank) for rank in range(8)]


def test_a_fourth_rank_that_breaks_the_rule_is_named() -> None:
    recorded = {rank: rank_of_16(rank) for rank in sampled_ranks(16)}
    check = sorted(recorded)[2]
    recorded[check][0] = TensorSlice("q", (0, 0), (8, 4))
    with pytest.raises(NoRuleError, match=rf"rank {check} of the engine holds q\[0:8, 0:4\], .* gives q\[88:96"):
        layouts_of_all(recorded, SHAPES, 16)


def test_ranks_that_copy_other_tensors_have_no_rule() -> None:
    recorded = {rank: rank_of_16(rank) for rank in sampled_ranks(16)}
    recorded[0] = recorded[0][::-1]
    with pytest.raises(NoRuleError, match="copy different tensors or use another order"):
        layouts_of_all(recorded, SHAPES, 16)


def test_numbers_that_do_not_grow_with_the_rank_have_no_rule() -> None:
    recorded = {rank: rank_of_16(rank) for rank in sampled_ranks(16)}
    recorded[15][0] = TensorSlice("q", (64, 0), (8, 4))
    with pytest.raises(NoRuleError, match=r"the slices of q .*follow no rule"):
        layouts_of_all(recorded, SHAPES, 16)

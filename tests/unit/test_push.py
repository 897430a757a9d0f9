"""Which tensors differ between policy and engine, from digests alone."""

from __future__ import annotations

import pytest

from grpo_mega.convert.digest import wrap
from grpo_mega.types import TensorSlice
from grpo_mega.weight_sync.push import differing_tensors

TOP, BOTTOM = TensorSlice("w", (0, 0), (2, 4)), TensorSlice("w", (2, 0), (2, 4))
NORM = TensorSlice("norm", (0,), (4,))
EXPECTED = {"w": 30, "norm": 5}


def test_slices_over_the_ranks_and_replicated_copies_that_agree_are_equal() -> None:
    assert differing_tensors(EXPECTED, [{TOP: 10, NORM: 5}, {BOTTOM: 20, NORM: 5}]) == []


def test_several_slices_of_a_tensor_on_one_rank_add_up() -> None:
    assert differing_tensors(EXPECTED, [{TOP: 10, BOTTOM: 20, NORM: 5}]) == []


def test_a_slice_that_no_rank_holds_is_found() -> None:
    assert differing_tensors(EXPECTED, [{TOP: 10, NORM: 5}, {NORM: 5}]) == ["w"]


def test_a_wrong_slice_is_found() -> None:
    assert differing_tensors(EXPECTED, [{TOP: 10, NORM: 5}, {BOTTOM: 21, NORM: 5}]) == ["w"]


@pytest.mark.parametrize(
    "held", [[{TOP: 10, BOTTOM: 20, NORM: 5}, {NORM: 6}], [{TOP: 10, BOTTOM: 20, NORM: 6}, {NORM: 5}]]
)
def test_copies_that_differ_are_found_whichever_rank_is_right(held: list[dict[TensorSlice, int]]) -> None:
    assert differing_tensors(EXPECTED, held) == ["norm"]


def test_a_copy_on_a_second_rank_counts_once() -> None:
    assert differing_tensors({"norm": 10}, [{NORM: 5}, {NORM: 5}]) == ["norm"]


def test_sums_wrap_as_digests_do() -> None:
    large = (1 << 63) - 1
    assert differing_tensors({"w": wrap(2 * large)}, [{TOP: large}, {BOTTOM: large}]) == []


def test_all_differing_tensors_are_listed_in_order() -> None:
    assert differing_tensors(EXPECTED, [{TOP: 11, BOTTOM: 20, NORM: 4}]) == ["norm", "w"]

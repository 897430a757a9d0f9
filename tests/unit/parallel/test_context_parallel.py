"""The zigzag split of packed rows: values worked by hand, and split followed by gather is the identity."""

from __future__ import annotations

import random

import pytest
import torch

from grpo_mega.parallel.context_parallel import rank_index, row_index


def test_chunks_of_two_ranks_and_two_segments_by_hand() -> None:
    bounds = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert rank_index(bounds, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert rank_index(bounds, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert row_index(bounds, 2).tolist() == [0, 1, 6, 7, 8, 9, 2, 3, 4, 10, 11, 5]


def test_three_ranks_by_hand() -> None:
    bounds = torch.tensor([0, 6])
    assert [rank_index(bounds, 3, rank).tolist() for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_parts_have_equal_size_hold_every_token_once_and_gather_to_the_row(cp: int, seed: int) -> None:
    rng = random.Random(seed)
    lengths = [2 * cp * rng.randrange(0, 6) for _ in range(rng.randrange(1, 8))] + [2 * cp]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    row = torch.randn(int(bounds[-1]), 2, generator=torch.Generator().manual_seed(seed))
    shares = [row[rank_index(bounds, cp, rank)] for rank in range(cp)]
    assert {len(share) for share in shares} == {len(row) // cp}
    assert torch.equal(torch.cat(shares)[row_index(bounds, cp)], row)
    # causal attention costs every rank the same: the sum of positions inside the sequences
    starts = torch.repeat_interleave(bounds[:-1], bounds.diff())
    positions = torch.arange(len(row)) - starts
    assert len({int(positions[rank_index(bounds, cp, rank)].sum()) for rank in range(cp)}) == 1


def test_a_segment_that_is_not_padded_is_rejected() -> None:
    with pytest.raises(AssertionError, match=r"6 tokens .*2 x cp = 4"):
        rank_index(torch.tensor([0, 4, 10]), 2, 0)

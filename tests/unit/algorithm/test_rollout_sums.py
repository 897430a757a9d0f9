"""Sums and means over the rollouts of a packed row."""

from __future__ import annotations

import math

import torch

from grpo_mega.algorithm.rollout_sums import Segments
from tests.helpers.loss_rows import make_row


def make_segments() -> Segments:
    """Return segments of positions 0-2, 3, 4-6 and 7-8 (padding); the second and the last have no loss token."""
    mask = torch.tensor([False, True, True, False, True, True, True, False, False])
    return Segments.of(make_row(torch.zeros(9), loss_mask=mask, cu_seqlens=[0, 3, 4, 7, 9]))


def test_sums_and_means_take_loss_tokens_only() -> None:
    values = torch.tensor([math.nan, 1.0, 3.0, math.inf, 2.0, 4.0, 9.0, math.nan, 0.0], requires_grad=True)
    found = make_segments()
    assert found.num_tokens.tolist() == [2.0, 0.0, 3.0, 0.0]
    assert found.sum(values).tolist() == [4.0, 0.0, 15.0, 0.0]
    assert found.mean(values).tolist() == [2.0, 0.0, 5.0, 0.0]
    assert not found.sum(values).requires_grad


def test_spread_gives_each_position_the_value_of_its_segment() -> None:
    spread = make_segments().spread(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.float32)
    assert spread.tolist() == [1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 4.0, 4.0]
    assert spread.dtype == torch.float32


def test_a_sum_of_many_small_float32_numbers_is_not_rounded_away() -> None:
    found = Segments.of(make_row(torch.zeros(100_001)))
    values = torch.full((100_001,), 1e-4)
    values[0] = 1e4
    assert abs(float(found.sum(values)[0]) - (1e4 + 10.0)) < 1e-5

"""The critic's loss: its papers' formula in float64, value and gradient, and what masks and splits do not change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grpo_mega.algorithm.value_loss import ValueLoss
from grpo_mega.types import Completion, Microbatch, Prompt, Reward, Rollout
from tests.helpers.packing import pack

LENGTHS = [3, 1, 9, 1, 6]


def make_rows(cuts: list[list[int]], row_tokens: int = 60) -> list[Microbatch]:
    """Return rows of rollouts with one prompt token each; every token weighs 1/20."""
    rollouts = [
        Rollout(Prompt(i, "", (3, 4), ""), Completion((5,) * n, (-1.0,) * n, "eos", 0, ""), Reward(0.0), 0)
        for i, n in enumerate(LENGTHS)
    ]
    return [
        pack(
            [(i, rollouts[i]) for i in ids],
            row_tokens=row_tokens,
            advantages=[0.0] * len(ids),
            token_weights=[1 / 20] * len(ids),
            pad_id=0,
        )
        for ids in cuts
    ]


def random_values() -> list[list[Tensor]]:
    """Return values, old values and returns of each rollout, float64."""
    torch.manual_seed(0)
    return [[torch.randn(n, dtype=torch.float64) for n in LENGTHS] for _ in range(3)]


def as_row(values: list[Tensor], microbatch: Microbatch) -> Tensor:
    found = torch.full(microbatch.loss_mask.shape, math.nan, dtype=torch.float64)
    chosen = [values[i] for i in microbatch.rollout_ids]
    return found.masked_scatter(microbatch.loss_mask, torch.cat(chosen)) if chosen else found


def loss_and_gradient(clip: float | None, cuts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return the loss summed over all rows, and its gradient."""
    values, old, returns = random_values()
    leaves = [v.requires_grad_() for v in values]
    total = torch.zeros((), dtype=torch.float64)
    for row in make_rows(cuts):
        filled = replace(row, old_values=as_row(old, row), returns=as_row(returns, row))
        loss, metrics = ValueLoss(clip)(as_row(leaves, row), filled)
        assert torch.equal(loss[~row.loss_mask], torch.zeros_like(loss[~row.loss_mask]))
        assert not metrics["clip_fraction"][~row.loss_mask].any()
        total = total + (loss * row.token_weights).sum()
    return total, torch.cat(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
@pytest.mark.parametrize("cuts", [[[0, 1, 2, 3, 4]], [[1], [0, 4], [], [3, 2]]])
def test_loss_and_gradient_are_those_of_the_papers_for_every_split(clip: float | None, cuts: list[list[int]]) -> None:
    values, old, returns = (torch.cat(v) for v in random_values())
    values.requires_grad_()
    squared = (values - returns) ** 2
    if clip is not None:
        kept = old + (values - old).clamp(-clip, clip)
        assert 0 < int(((kept - returns) ** 2 > squared).sum()) < len(values)
        squared = torch.maximum(squared, (kept - returns) ** 2)
    expected = squared.sum() / 2 / 20
    (gradient,) = torch.autograd.grad(expected, values)
    total, found = loss_and_gradient(clip, cuts)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-7)


def test_a_clipped_token_has_no_gradient_and_is_counted() -> None:
    (row,) = make_rows([[1]])
    at = row.loss_mask.nonzero().squeeze(1)
    assert len(at) == 1
    old, returns = torch.zeros(60), torch.full((60,), 0.25)
    for value, clipped, loss, slope in (
        (1.0, 0.0, 0.28125, 0.75),
        (-1.0, 0.0, 0.78125, -1.25),
        (0.375, 1.0, 0.0078125, 0.0),
    ):
        values = torch.full((60,), value, requires_grad=True)
        if clipped:  # 0.375 is nearer to the return of 0.375 than the bounded 0.25 is
            returns = torch.full((60,), 0.375)
        found, metrics = ValueLoss(0.25)(values, replace(row, old_values=old, returns=returns))
        found.sum().backward()
        assert metrics["clip_fraction"][at].item() == clipped
        assert found[at].item() == loss
        assert values.grad is not None
        assert values.grad[at].item() == slope


def test_missing_returns_are_an_error() -> None:
    (row,) = make_rows([[0]])
    with pytest.raises(ValueError, match="returns and old_values"):
        ValueLoss(0.2)(torch.zeros(60), row)

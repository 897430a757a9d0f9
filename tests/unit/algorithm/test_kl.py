"""The k3 estimator against its formula in float64."""

from __future__ import annotations

import math

import torch

from grpo_mega.algorithm.kl import k3


def test_k3_gives_the_hand_computed_numbers() -> None:
    # d = ref - log_probs = ln 2: 2 - ln 2 - 1; d = -ln 2: 1/2 + ln 2 - 1
    kl = k3(torch.tensor([-2 * math.log(2), -math.log(2)]), torch.tensor([-math.log(2), -2 * math.log(2)]))
    torch.testing.assert_close(kl, torch.tensor([1 - math.log(2), math.log(2) - 0.5]), rtol=1e-6, atol=0)


def test_gradient_is_one_minus_exp_of_the_difference() -> None:
    log_probs = torch.tensor([-1.0, -0.5, -3.0], dtype=torch.float64, requires_grad=True)
    ref_log_probs = torch.tensor([-1.0, -2.5, -0.25], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(k3(log_probs, ref_log_probs).sum(), log_probs)
    expected = torch.tensor([0.0, 1 - math.exp(-2.0), 1 - math.exp(2.75)], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_equal_log_probs_give_exactly_zero() -> None:
    log_probs = -10 * torch.rand(100)
    assert (k3(log_probs, log_probs.clone()) == 0).all()


def test_small_differences_are_never_negative_and_not_rounded_away() -> None:
    difference = torch.cat([sign * torch.logspace(-8, 1, 100_000) for sign in (-1, 1)])
    kl = k3(torch.zeros_like(difference), difference)
    assert (kl >= 0).all()
    exact = torch.expm1(difference.double()) - difference.double()
    large_enough = difference.abs() > 1e-4
    torch.testing.assert_close(kl[large_enough].double(), exact[large_enough], rtol=2e-3, atol=0)

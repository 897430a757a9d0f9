"""The loss per token: hand-computed numbers of GRPO, masks, KL and entropy. The papers are in test_algorithms.py."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch

from grpo_mega.algorithm.base import Surrogate
from grpo_mega.algorithm.loss import PolicyLoss
from grpo_mega.algorithm.mismatch_correction import Correction, CorrectionForm
from grpo_mega.algorithm.surrogates.clipped_ratio import clipped_ratio
from grpo_mega.algorithm.surrogates.clipped_sequence_ratio import clipped_sequence_ratio
from grpo_mega.algorithm.surrogates.clipped_weight import clipped_weight
from grpo_mega.algorithm.surrogates.geometric_mean import geometric_mean
from grpo_mega.algorithm.surrogates.policy_gradient import policy_gradient
from grpo_mega.algorithm.surrogates.soft_gate import soft_gate
from tests.helpers.loss_rows import make_row

NAN, INF = float("nan"), float("inf")
CLIPPED = partial(clipped_ratio, clip_low=0.2, clip_high=0.2)


def test_loss_of_six_tokens_is_the_hand_computed_one() -> None:
    ratio = torch.tensor([1.5, 1.25, 0.5, 1.5, 0.75, 0.9])
    log_probs = ratio.log().requires_grad_()
    microbatch = make_row(torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0]), old_log_probs=torch.zeros(6))
    loss, metrics = PolicyLoss(partial(clipped_ratio, clip_low=0.2, clip_high=0.3))(
        log_probs, torch.ones(6), microbatch
    )
    # A > 0: min(1.5, 1.3) * 2, and 1.25 and 0.5 stay; A < 0: 1.5 stays, min(0.75 * -2, 0.8 * -2), and 0.9 stays
    torch.testing.assert_close(loss, torch.tensor([-2.6, -2.5, -1.0, 3.0, 1.6, 1.8]), rtol=1e-6, atol=0)
    assert metrics["clip_fraction"].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert metrics["clip_positive"].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert metrics["clip_negative"].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    torch.testing.assert_close(metrics["ratio"], ratio, rtol=1e-6, atol=0)
    assert metrics["entropy"].tolist() == [1.0] * 6
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -2.5, -1.0, 3.0, 0.0, 1.8]), rtol=1e-6, atol=0)


SURROGATES: list[Surrogate] = [
    CLIPPED,
    partial(CLIPPED, dual_clip=3.0),
    partial(clipped_sequence_ratio, clip_low=0.2, clip_high=0.2),
    partial(geometric_mean, clip_low=0.4, clip_high=0.4),
    partial(clipped_weight, clip_high=4.0),
    partial(clipped_weight, clip_low=0.2, clip_high=4.0),
    partial(soft_gate, gate_positive=1.0, gate_negative=1.05),
    policy_gradient,
]
CORRECTIONS = [None, *(Correction(f, low=0.5, high=5.0, veto=1e-4) for f in get_args(CorrectionForm))]


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_masked_garbage_gives_zero_loss_and_zero_gradient(
    garbage: float, surrogate: Surrogate, correction: Correction | None
) -> None:
    values = torch.tensor([garbage, -1.0])
    log_probs = values.clone().requires_grad_()
    microbatch = make_row(
        torch.tensor([garbage, 1.0]),
        loss_mask=torch.tensor([False, True]),
        old_log_probs=values.clone(),
        sampler_log_probs=values.clone(),
        ref_log_probs=values.flip(0).where(torch.tensor([True, False]), torch.tensor(-1.5)),
    )
    loss_of = PolicyLoss(surrogate, kl_coef=0.1, entropy_coef=0.1, correction=correction)
    loss, metrics = loss_of(log_probs, torch.full((2,), garbage), microbatch)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert loss[0] == 0
    assert gradient[0] == 0
    assert torch.isfinite(gradient).all()
    assert {name: value[0].item() for name, value in metrics.items()} == dict.fromkeys(metrics, 0.0)


def test_without_old_log_probs_the_ratio_is_one_and_carries_the_policy_gradient() -> None:
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.5, -3.0])
    loss, metrics = PolicyLoss(CLIPPED)(log_probs, torch.zeros(2), make_row(advantages))
    assert loss.tolist() == [-0.5, 3.0]
    assert metrics["ratio"].tolist() == [1.0, 1.0]
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert gradient.tolist() == [-0.5, 3.0]


def test_extreme_log_ratios_give_the_clipped_value_and_no_nan() -> None:
    log_probs = torch.tensor([0.0, 0.0, -500.0, -500.0], requires_grad=True)
    old = torch.tensor([-500.0, -500.0, 0.0, 0.0])
    microbatch = make_row(torch.tensor([1.0, 0.0, 1.0, -1.0]), old_log_probs=old)
    loss, _ = PolicyLoss(CLIPPED)(log_probs, torch.zeros(4), microbatch)
    torch.testing.assert_close(loss, torch.tensor([-1.2, 0.0, 0.0, 0.8]), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert gradient.tolist() == [0.0] * 4


def test_an_infinite_loss_stays_infinite() -> None:
    microbatch = make_row(torch.tensor([-1.0]), old_log_probs=torch.tensor([-500.0]))
    loss, _ = PolicyLoss(CLIPPED)(torch.zeros(1), torch.zeros(1), microbatch)
    assert loss.item() == INF


@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0])
def test_metrics_stay_finite_for_log_ratios_of_any_size(log_ratio: float) -> None:
    microbatch = make_row(
        torch.ones(1), old_log_probs=torch.tensor([-log_ratio]), ref_log_probs=torch.tensor([log_ratio])
    )
    _, metrics = PolicyLoss(CLIPPED)(torch.zeros(1), torch.zeros(1), microbatch)
    bound = math.exp(40)
    assert metrics["ratio"].item() == pytest.approx(bound if log_ratio > 0 else 0.0, rel=1e-5)
    assert metrics["kl"].item() == pytest.approx(bound if log_ratio > 0 else 999.0, rel=1e-5)
    assert torch.isfinite(metrics["kl"] * 1e15).all()  # the sum over a step's tokens


def test_kl_is_added_with_its_coefficient_and_reported_without_it() -> None:
    log_probs = torch.tensor([-1.0], requires_grad=True)
    microbatch = make_row(torch.zeros(1), ref_log_probs=torch.tensor([-1.0 + math.log(2)]))
    loss, metrics = PolicyLoss(CLIPPED, kl_coef=0.5)(log_probs, torch.zeros(1), microbatch)
    assert loss.item() == pytest.approx(0.5 * (1 - math.log(2)), rel=1e-6)
    assert metrics["kl"].item() == pytest.approx(1 - math.log(2), rel=1e-6)
    assert not any(metric.requires_grad for metric in metrics.values())


def test_a_reference_is_needed_exactly_when_the_coefficient_is_positive() -> None:
    with_kl, without = PolicyLoss(CLIPPED, kl_coef=0.04), PolicyLoss(CLIPPED)
    assert with_kl.needs_reference
    assert not without.needs_reference
    microbatch = make_row(torch.ones(1))
    assert "kl" not in without(torch.zeros(1), torch.zeros(1), microbatch)[1]
    with pytest.raises(ValueError, match="ref_log_probs"):
        with_kl(torch.zeros(1), torch.zeros(1), microbatch)
    with_kl(torch.zeros(1), torch.zeros(1), replace(microbatch, ref_log_probs=torch.zeros(1)))


def test_a_kl_that_is_only_in_the_reward_is_reported_and_not_added() -> None:
    log_probs = torch.tensor([-1.0], requires_grad=True)
    microbatch = make_row(torch.zeros(1), ref_log_probs=torch.tensor([-3.0]))
    loss, metrics = PolicyLoss(CLIPPED, kl_estimator="k1")(log_probs, torch.zeros(1), microbatch)
    assert loss.item() == 0
    assert metrics["kl"].item() == 2


def test_the_entropy_bonus_lowers_the_loss_and_carries_gradient() -> None:
    entropy = torch.tensor([2.0, 3.0], requires_grad=True)
    microbatch = make_row(torch.zeros(2), loss_mask=torch.tensor([True, False]))
    loss, _ = PolicyLoss(CLIPPED, entropy_coef=0.5)(torch.zeros(2), entropy, microbatch)
    assert loss.tolist() == [-1.0, 0.0]
    (gradient,) = torch.autograd.grad(loss.sum(), entropy)
    assert gradient.tolist() == [-0.5, 0.0]


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("log_ratio", [-500.0, 500.0])
def test_an_extreme_ratio_of_a_good_rollout_gives_no_nan(surrogate: Surrogate, log_ratio: float) -> None:
    log_probs = torch.tensor([log_ratio], requires_grad=True)
    loss, _ = PolicyLoss(surrogate)(log_probs, torch.zeros(1), make_row(torch.ones(1), old_log_probs=torch.zeros(1)))
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


def test_a_dual_clip_bounds_the_loss_of_a_bad_token() -> None:
    log_probs = torch.tensor([4.0, 2.0, 0.5]).log().requires_grad_()
    microbatch = make_row(torch.full((3,), -2.0), old_log_probs=torch.zeros(3))
    loss, metrics = PolicyLoss(partial(CLIPPED, dual_clip=3.0))(log_probs, torch.zeros(3), microbatch)
    torch.testing.assert_close(loss, torch.tensor([6.0, 4.0, 1.6]), rtol=1e-6, atol=0)
    assert metrics["clip_fraction"].tolist() == [1.0, 0.0, 1.0]
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 4.0, 0.0]), rtol=1e-6, atol=0)

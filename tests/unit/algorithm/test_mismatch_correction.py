"""Factors that correct the mismatch between policy and engine, by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from grpo_mega.algorithm.loss import PolicyLoss
from grpo_mega.algorithm.mismatch_correction import Correction, CorrectionForm
from grpo_mega.algorithm.rollout_sums import Segments
from grpo_mega.algorithm.surrogates.clipped_ratio import clipped_ratio
from tests.helpers.loss_rows import make_row

# two rollouts of three tokens: policy over engine per token, whose products are 3 and 0.02
K = torch.tensor([0.25, 2.0, 6.0, 1.0, 0.4, 0.05])
CLIPPED = partial(clipped_ratio, clip_low=0.2, clip_high=0.2)
SEGMENTS = Segments.of(make_row(torch.zeros(6), cu_seqlens=[0, 3, 6]))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("token_truncated", [0.25, 2.0, 4.0, 1.0, 0.4, 0.05]),
        ("sequence_truncated", [3.0, 3.0, 3.0, 0.02, 0.02, 0.02]),
        ("token_masked", [0.0, 2.0, 0.0, 1.0, 0.0, 0.0]),
        (None, [1.0] * 6),
    ],
)
def test_factors_are_the_hand_computed_ones(form: CorrectionForm | None, expected: list[float]) -> None:
    factor, masked, vetoed = Correction(form, low=0.5, high=4.0, veto=None).factors(K.log(), SEGMENTS)
    torch.testing.assert_close(factor, torch.tensor(expected), rtol=1e-5, atol=0)
    assert masked.tolist() == ([1.0, 0.0, 1.0, 0.0, 1.0, 1.0] if form == "token_masked" else [0.0] * 6)
    assert vetoed.tolist() == [0.0] * 6


def test_a_sequence_factor_is_truncated_at_the_bound() -> None:
    factor, _, _ = Correction("sequence_truncated", low=0.0, high=2.0, veto=None).factors(K.log(), SEGMENTS)
    torch.testing.assert_close(factor[:3], torch.full((3,), 2.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["token_truncated", "sequence_truncated", "token_masked", None])
def test_one_token_below_the_veto_excludes_its_rollout(form: CorrectionForm | None) -> None:
    factor, _, vetoed = Correction(form, low=0.5, high=4.0, veto=0.1).factors(K.log(), SEGMENTS)
    assert vetoed.tolist() == [0.0] * 3 + [1.0] * 3
    assert factor[3:].tolist() == [0.0] * 3
    assert factor[:3].sum() > 0


def test_equal_probabilities_do_not_change_the_loss() -> None:
    old = torch.tensor([-1.0, -2.0])
    microbatch = make_row(torch.tensor([1.0, -1.0]), old_log_probs=old, sampler_log_probs=old)
    plain, _ = PolicyLoss(CLIPPED)(old + 0.1, torch.zeros(2), microbatch)
    for form in ("token_truncated", "sequence_truncated", "token_masked"):
        correction = Correction(form, low=0.5, high=2.0, veto=0.1)
        found, metrics = PolicyLoss(CLIPPED, correction=correction)(old + 0.1, torch.zeros(2), microbatch)
        assert torch.equal(found, plain)
        assert metrics["correction"].tolist() == [1.0, 1.0]


def test_masked_tokens_have_no_gradient_for_any_mismatch() -> None:
    log_probs = torch.tensor([500.0], requires_grad=True)
    microbatch = make_row(-torch.ones(1), old_log_probs=torch.zeros(1), sampler_log_probs=torch.tensor([50.0]))
    loss_of = PolicyLoss(CLIPPED, correction=Correction("token_masked", low=0.5, high=5.0, veto=None))
    loss, metrics = loss_of(log_probs, torch.zeros(1), microbatch)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert loss.item() == gradient.item() == 0
    assert metrics["masked"].item() == 1


def test_with_the_sampler_as_old_policy_the_ratio_is_the_weight_and_the_correction_only_masks() -> None:
    # ratios policy / sampler: 1.1 (inside), 1.5 (beyond the clip), 6 and 0.4 (beyond the mask), 0.9 (inside)
    sampler = torch.tensor([-1.0, -2.0, -3.0, -0.5, -1.5])
    ratios = torch.tensor([1.1, 1.5, 6.0, 0.4, 0.9])
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0, -2.0])
    log_probs = (sampler + ratios.log()).requires_grad_()
    correction = Correction("token_masked", low=0.5, high=5.0, veto=None, ratio_has_mismatch=True)
    row = make_row(advantages, sampler_log_probs=sampler, old_log_probs=torch.full((5,), -9.0))  # old is not read
    loss, metrics = PolicyLoss(CLIPPED, correction=correction, old_is_sampler=True)(log_probs, torch.zeros(5), row)
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.1, -1.2, 0.0, 0.0, 1.8]))
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    torch.testing.assert_close(gradient, torch.tensor([-1.1, 0.0, 0.0, 0.0, 1.8]))  # -A * ratio where no bound holds
    torch.testing.assert_close(metrics["ratio"], ratios)
    assert metrics["masked"].tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    assert metrics["correction"].tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_with_the_sampler_as_old_policy_a_veto_excludes_its_rollout_without_a_weight() -> None:
    correction = Correction("token_masked", low=0.3, high=10.0, veto=0.1, ratio_has_mismatch=True)
    factor, _, vetoed = correction.factors(K.log(), SEGMENTS)
    assert factor.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert vetoed.tolist() == [0.0] * 3 + [1.0] * 3


@pytest.mark.parametrize("form", ["token_truncated", "sequence_truncated"])
def test_the_mismatch_is_not_counted_twice(form: CorrectionForm) -> None:
    with pytest.raises(ValueError, match=rf"form={form}"):
        Correction(form, low=0.0, high=2.0, veto=None, ratio_has_mismatch=True)


def test_a_mismatch_that_is_not_a_number_is_not_hidden_by_the_mask() -> None:
    correction = Correction("token_masked", low=0.5, high=5.0, veto=None, ratio_has_mismatch=True)
    row = make_row(torch.ones(1), sampler_log_probs=torch.tensor([float("nan")]))
    loss, _ = PolicyLoss(CLIPPED, correction=correction, old_is_sampler=True)(torch.zeros(1), torch.zeros(1), row)
    assert loss.isnan().all()

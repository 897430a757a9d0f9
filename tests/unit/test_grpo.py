"""The GRPO loss against hand-computed numbers and a float64 oracle that follows the paper, rollout by rollout."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grpo_mega.algorithm import make_loss
from grpo_mega.algorithm.advantage import group_advantages
from grpo_mega.algorithm.aggregate import rollout_mean_weights
from grpo_mega.algorithm.grpo import GrpoLoss
from grpo_mega.types import Microbatch, UserError

NAN, INF = float("nan"), float("inf")


def row(
    advantages: Tensor,
    *,
    loss_mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
) -> Microbatch:
    """A microbatch of one segment; what the loss does not read is zero."""
    length = len(advantages)
    tokens = torch.zeros(length, dtype=torch.int64)
    return Microbatch(
        rollout_ids=(0,),
        token_ids=tokens,
        position_ids=tokens,
        labels=tokens,
        loss_mask=torch.ones(length, dtype=torch.bool) if loss_mask is None else loss_mask,
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        advantages=advantages,
        token_weights=torch.ones(length) if token_weights is None else token_weights,
        sampler_log_probs=torch.zeros(length),
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
    )


def oracle(log_probs: Tensor, old: Tensor, ref: Tensor, rewards: Tensor, lengths: list[int], kl_coef: float) -> Tensor:
    """-J_GRPO of arXiv:2402.03300, equation 3, mean over prompts; [T] holds the rollouts one after another."""
    rewards = rewards.double()
    num_prompts, group_size = rewards.shape
    objective = torch.zeros((), dtype=torch.float64)
    start = 0
    for prompt in range(num_prompts):
        std = rewards[prompt].std()
        for rollout in range(group_size):
            length = lengths[prompt * group_size + rollout]
            advantage = (rewards[prompt, rollout] - rewards[prompt].mean()) / (std + 1e-6) if std > 0 else 0.0
            total = torch.zeros((), dtype=torch.float64)
            for t in range(start, start + length):
                ratio = (log_probs[t] - old[t]).exp()
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - 0.2, 1 + 0.3) * advantage)
                kl = (ref[t] - log_probs[t]).exp() - (ref[t] - log_probs[t]) - 1
                total = total + surrogate - kl_coef * kl
            objective = objective + total / length / group_size / num_prompts
            start += length
    return -objective


def test_loss_of_six_tokens_is_the_hand_computed_one() -> None:
    ratio = torch.tensor([1.5, 1.25, 0.5, 1.5, 0.75, 0.9])
    log_probs = ratio.log().requires_grad_()
    microbatch = row(torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0]), old_log_probs=torch.zeros(6))
    loss, metrics = GrpoLoss(clip_low=0.2, clip_high=0.3, kl_coef=0.0)(log_probs, torch.ones(6), microbatch)
    # A > 0: min(1.5, 1.3) * 2, and 1.25 and 0.5 stay; A < 0: 1.5 stays, min(0.75 * -2, 0.8 * -2), and 0.9 stays
    torch.testing.assert_close(loss, torch.tensor([-2.6, -2.5, -1.0, 3.0, 1.6, 1.8]), rtol=1e-6, atol=0)
    assert metrics["clip_fraction"].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    torch.testing.assert_close(metrics["ratio"], ratio, rtol=1e-6, atol=0)
    assert metrics["entropy"].tolist() == [1.0] * 6
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -2.5, -1.0, 3.0, 0.0, 1.8]), rtol=1e-6, atol=0)


def test_loss_and_gradient_equal_the_paper_in_float64_with_masks_and_padding() -> None:
    torch.manual_seed(0)
    lengths = [3, 1, 6, 4, 2, 1]
    rewards = torch.tensor([[1.0, 0.0, 0.25], [0.1, 0.1, 0.1]])
    total = sum(lengths)
    ref = -3 * torch.rand(total, dtype=torch.float64)
    old = ref + 0.3 * torch.randn(total, dtype=torch.float64)
    log_probs = (old + 0.4 * torch.randn(total, dtype=torch.float64)).requires_grad_()
    expected = oracle(log_probs, old, ref, rewards, lengths, kl_coef=0.04)
    (expected_gradient,) = torch.autograd.grad(expected, log_probs)

    # The same tokens in one row, each rollout behind two prompt positions that hold garbage.
    advantages = group_advantages(rewards).flatten()
    weights = rollout_mean_weights(lengths, num_rollouts=len(lengths))
    places: list[int] = []
    mask: list[bool] = []
    for length in lengths:
        places += [len(mask) + 2 + t for t in range(length)]
        mask += [False, False] + [True] * length
    loss_mask = torch.tensor(mask)

    def spread(values: Tensor, fill: float) -> Tensor:
        return torch.full((len(mask),), fill, dtype=values.dtype).index_put((torch.tensor(places),), values)

    repeats = torch.tensor(lengths)
    token_weights = spread(torch.tensor(weights, dtype=torch.float64).repeat_interleave(repeats), 0.0)
    microbatch = row(
        spread(advantages.repeat_interleave(repeats), 1e9),
        loss_mask=loss_mask,
        token_weights=token_weights,
        old_log_probs=spread(old, NAN),
        ref_log_probs=spread(ref, INF),
    )
    loss_fn = GrpoLoss(clip_low=0.2, clip_high=0.3, kl_coef=0.04)
    token_loss, metrics = loss_fn(spread(log_probs, -INF), torch.zeros(len(mask)), microbatch)
    loss = (token_loss * token_weights).sum()
    (gradient,) = torch.autograd.grad(loss, log_probs)
    # advantages are float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)
    assert 0 < metrics["clip_fraction"].sum() < total
    assert (metrics["kl"][loss_mask] > 0).all()


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_masked_garbage_gives_zero_loss_and_zero_gradient(garbage: float) -> None:
    values = torch.tensor([garbage, -1.0])
    log_probs = values.clone().requires_grad_()
    microbatch = row(
        torch.tensor([garbage, 1.0]),
        loss_mask=torch.tensor([False, True]),
        old_log_probs=values.clone(),
        ref_log_probs=values.flip(0).where(torch.tensor([True, False]), torch.tensor(-1.5)),
    )
    loss, metrics = GrpoLoss(clip_low=0.2, clip_high=0.2, kl_coef=0.1)(log_probs, torch.full((2,), garbage), microbatch)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert loss[0] == 0
    assert gradient[0] == 0
    assert torch.isfinite(gradient).all()
    assert {name: value[0].item() for name, value in metrics.items()} == dict.fromkeys(metrics, 0.0)


def test_without_old_log_probs_the_ratio_is_one_and_carries_the_policy_gradient() -> None:
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.5, -3.0])
    loss, metrics = GrpoLoss(clip_low=0.2, clip_high=0.2, kl_coef=0.0)(log_probs, torch.zeros(2), row(advantages))
    assert loss.tolist() == [-0.5, 3.0]
    assert metrics["ratio"].tolist() == [1.0, 1.0]
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert gradient.tolist() == [-0.5, 3.0]


def test_extreme_log_ratios_give_the_clipped_value_and_no_nan() -> None:
    log_probs = torch.tensor([0.0, 0.0, -500.0, -500.0], requires_grad=True)
    old = torch.tensor([-500.0, -500.0, 0.0, 0.0])
    microbatch = row(torch.tensor([1.0, 0.0, 1.0, -1.0]), old_log_probs=old)
    loss, _ = GrpoLoss(clip_low=0.2, clip_high=0.2, kl_coef=0.0)(log_probs, torch.zeros(4), microbatch)
    torch.testing.assert_close(loss, torch.tensor([-1.2, 0.0, 0.0, 0.8]), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert gradient.tolist() == [0.0] * 4


def test_an_infinite_loss_stays_infinite() -> None:
    microbatch = row(torch.tensor([-1.0]), old_log_probs=torch.tensor([-500.0]))
    loss, _ = GrpoLoss(clip_low=0.2, clip_high=0.2, kl_coef=0.0)(torch.zeros(1), torch.zeros(1), microbatch)
    assert loss.item() == INF


def test_kl_is_added_with_its_coefficient_and_reported_without_it() -> None:
    log_probs = torch.tensor([-1.0], requires_grad=True)
    microbatch = row(torch.zeros(1), ref_log_probs=torch.tensor([-1.0 + math.log(2)]))
    loss, metrics = GrpoLoss(clip_low=0.2, clip_high=0.2, kl_coef=0.5)(log_probs, torch.zeros(1), microbatch)
    assert loss.item() == pytest.approx(0.5 * (1 - math.log(2)), rel=1e-6)
    assert metrics["kl"].item() == pytest.approx(1 - math.log(2), rel=1e-6)
    assert not any(metric.requires_grad for metric in metrics.values())


def test_reference_is_needed_exactly_when_the_coefficient_is_positive() -> None:
    with_kl = make_loss("grpo", kl_coef=0.04, clip_low=0.2, clip_high=0.2)
    without = make_loss("grpo", kl_coef=0.0, clip_low=0.2, clip_high=0.2)
    assert with_kl.needs_reference
    assert not without.needs_reference
    microbatch = row(torch.ones(1))
    assert "kl" not in without(torch.zeros(1), torch.zeros(1), microbatch)[1]
    with pytest.raises(ValueError, match="ref_log_probs"):
        with_kl(torch.zeros(1), torch.zeros(1), microbatch)
    with_kl(torch.zeros(1), torch.zeros(1), replace(microbatch, ref_log_probs=torch.zeros(1)))


def test_an_unknown_algorithm_is_named() -> None:
    with pytest.raises(UserError, match=r"algorithm.name='ppo'.*'grpo'"):
        make_loss("ppo", kl_coef=0.0, clip_low=0.2, clip_high=0.2)

"""Every `algorithm.name` against its paper: the objective in float64, rollout by rollout, without packing or weights.

The oracles share no code with the package. They get rewards and log-probs of each rollout and return the loss; autograd
gives its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grpo_mega.config.algorithm_presets import ALGORITHM_DEFAULTS
from grpo_mega.config.algorithm_section import AlgorithmConfig
from tests.helpers.algorithm_oracle import (
    GROUP,
    LENGTHS,
    MAX_TOKENS,
    REWARDS,
    RolloutValues,
    compute_update_loss,
    gradient_of,
    make_data,
)

# --- the papers ---


def std_advantage(i: int) -> float:
    group = torch.tensor(REWARDS[i // GROUP], dtype=torch.float64)
    return float((group[i % GROUP] - group.mean()) / (group.std() + 1e-6)) if group.std() > 0 else 0.0


def mean_advantage(i: int) -> float:
    group = REWARDS[i // GROUP]
    return group[i % GROUP] - sum(group) / GROUP


def clipped_objective(ratio: Tensor, advantage: float | Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def k3(data: RolloutValues, i: int) -> Tensor:
    d = data.ref[i] - data.log_probs[i]
    return d.exp() - d - 1


def stack_rollouts(function: Callable[[int], Tensor]) -> list[Tensor]:
    return [function(i) for i in range(len(LENGTHS))]


def grpo(data: RolloutValues) -> Tensor:
    parts = stack_rollouts(
        lambda i: (clipped_objective(data.differ(i).exp(), std_advantage(i), 0.2, 0.2) - 0.04 * k3(data, i)).mean()
    )
    return -torch.stack(parts).mean()


def dr_grpo(data: RolloutValues) -> Tensor:
    parts = stack_rollouts(
        lambda i: clipped_objective(data.differ(i).exp(), mean_advantage(i), 0.2, 0.2).sum() / MAX_TOKENS
    )
    return -torch.stack(parts).mean()


def dapo(data: RolloutValues) -> Tensor:
    """The buffer is a fifth of 20 tokens: a rollout of 17 tokens loses 1/4, one of 20 loses 1. The constraint on the
    groups leaves the one of equal rewards out."""
    rewards = torch.tensor(REWARDS, dtype=torch.float64).flatten()
    for i, n in enumerate(LENGTHS):
        rewards[i] += 0 if n <= 16 else (16 - n) / 4
    groups = rewards.view(-1, GROUP)
    std = groups.std(dim=1, keepdim=True)
    advantages = torch.where(std > 0, (groups - groups.mean(1, keepdim=True)) / (std + 1e-6), 0.0).flatten()
    parts = stack_rollouts(lambda i: clipped_objective(data.differ(i).exp(), advantages[i], 0.2, 0.28).sum())
    return -torch.stack(parts).sum() / sum(LENGTHS[:4] + LENGTHS[8:])


def gspo(data: RolloutValues) -> Tensor:
    return -torch.stack(
        stack_rollouts(lambda i: clipped_objective(data.differ(i).mean().exp(), std_advantage(i), 3e-4, 4e-4))
    ).mean()


def gmpo(data: RolloutValues) -> Tensor:
    """The product over tokens to the power 1/|o|, written as a product, with the sign outside."""

    def rollout_term(i: int) -> Tensor:
        ratio, advantage = data.differ(i).exp(), std_advantage(i)
        sign = math.copysign(1.0, advantage)
        bounded = torch.minimum(ratio * sign, ratio.clamp(math.exp(-0.4), math.exp(0.4)) * sign)
        return (bounded.abs() * abs(advantage)).log().mean().exp() * sign if advantage else ratio.sum() * 0

    return -torch.stack(stack_rollouts(rollout_term)).mean()


def cispo(data: RolloutValues) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for group in range(len(REWARDS)):
        ids = range(group * GROUP, (group + 1) * GROUP)
        parts = [
            (data.differ(i).exp().clamp(max=5.0).detach() * std_advantage(i) * data.log_probs[i]).sum() for i in ids
        ]
        total = total + torch.stack(parts).sum() / sum(LENGTHS[i] for i in ids)
    return -total / len(REWARDS)


def sapo(data: RolloutValues) -> Tensor:
    def rollout_term(i: int) -> Tensor:
        tau = 1.0 if std_advantage(i) > 0 else 1.05
        return (4 / tau / (1 + (-tau * (data.differ(i).exp() - 1)).exp()) * std_advantage(i)).mean()

    return -torch.stack(stack_rollouts(rollout_term)).mean()


def rloo(data: RolloutValues) -> Tensor:
    rewards = [
        REWARDS[i // GROUP][i % GROUP] - 0.05 * float((data.old[i] - data.ref[i]).sum()) for i in range(len(LENGTHS))
    ]

    def rollout_term(i: int) -> Tensor:
        first = i // GROUP * GROUP
        others = [rewards[j] for j in range(first, first + GROUP) if j != i]
        return (rewards[i] - sum(others) / len(others)) * data.log_probs[i].sum()

    return -torch.stack(stack_rollouts(rollout_term)).mean()


def reinforce_plus_plus(data: RolloutValues) -> Tensor:
    advantages = []
    for i, n in enumerate(LENGTHS):
        penalty = 0.001 * (data.old[i] - data.ref[i])
        advantages.append(torch.stack([REWARDS[i // GROUP][i % GROUP] - penalty[t:].sum() for t in range(n)]))
    flat = torch.cat(advantages)
    norm = [(a - flat.mean()) / flat.std(correction=0) for a in advantages]
    return -torch.cat(stack_rollouts(lambda i: clipped_objective(data.differ(i).exp(), norm[i], 0.2, 0.2))).mean()


def reinforce_plus_plus_baseline(data: RolloutValues) -> Tensor:
    flat = torch.cat([torch.full((n,), mean_advantage(i), dtype=torch.float64) for i, n in enumerate(LENGTHS)])
    norm = iter(((flat - flat.mean()) / flat.std(correction=0)).split(LENGTHS))
    kl = stack_rollouts(lambda i: (data.log_probs[i] - data.ref[i]) ** 2 / 2)
    parts = stack_rollouts(lambda i: clipped_objective(data.differ(i).exp(), next(norm), 0.2, 0.2) - 0.001 * kl[i])
    return -torch.cat(parts).mean()


def ppo(data: RolloutValues) -> Tensor:
    """Advantages as the sum of equation 11 with the deltas of equation 12, whitened over the step's tokens."""
    advantages = []
    for i, n in enumerate(LENGTHS):
        rewards = -0.02 * (data.old[i] - data.ref[i])
        rewards[-1] += REWARDS[i // GROUP][i % GROUP]
        following = torch.cat([data.values[i][1:], torch.zeros(1, dtype=torch.float64)])
        delta = rewards + following - data.values[i]
        advantages.append(torch.stack([sum(0.95 ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)]))
    flat = torch.cat(advantages)
    norm = [(a - flat.mean()) / flat.std(correction=0) for a in advantages]
    return -torch.cat(stack_rollouts(lambda i: clipped_objective(data.differ(i).exp(), norm[i], 0.2, 0.2))).mean()


PAPERS: dict[str, Callable[[RolloutValues], Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "gmpo": gmpo,
    "cispo": cispo,
    "sapo": sapo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "ppo": ppo,
}


# --- the package ---


def test_every_name_has_an_oracle() -> None:
    assert set(PAPERS) == set(ALGORITHM_DEFAULTS)


@pytest.mark.parametrize("spread", [0.4, 0.2, 6e-4])  # within and beyond the bounds of each algorithm
@pytest.mark.parametrize("name", PAPERS)
def test_loss_and_gradient_are_those_of_the_paper(name: str, spread: float) -> None:
    data = make_data(spread)
    expected = PAPERS[name](data)
    found, _ = compute_update_loss(data, AlgorithmConfig(name=name))
    # advantages and weights are float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient_of(found, data), gradient_of(expected, data), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dp", "max_tokens", "row_multiple"), [(1, 25, 1), (3, 60, 8), (16, 40, 1)])
@pytest.mark.parametrize("name", PAPERS)
def test_loss_and_gradient_are_the_same_for_every_split(name: str, dp: int, max_tokens: int, row_multiple: int) -> None:
    data = make_data()
    whole, _ = compute_update_loss(data, AlgorithmConfig(name=name))
    parts, batches = compute_update_loss(
        data, AlgorithmConfig(name=name), dp=dp, max_tokens=max_tokens, row_multiple=row_multiple
    )
    rows = [row for batch in batches for row in batch.microbatches]
    assert len(rows) > 1
    assert dp < 16 or any(not row.rollout_ids for row in rows)  # some ranks have nothing to do
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient_of(parts, data), gradient_of(whole, data), rtol=1e-12, atol=1e-14)


OPTIONS: dict[str, dict[str, object]] = {
    "dual clip": {"dual_clip": 1.3},
    "sequence ratio with dual clip": {"name": "gspo", "clip_low": 0.1, "clip_high": 0.1, "dual_clip": 1.05},
    "entropy bonus": {"entropy_coef": 0.1},
    "truncated tokens": {"correction": "token_truncated"},
    "truncated sequences": {"correction": "sequence_truncated"},
    "IcePop": {"correction": "token_masked"},
    "veto": {"correction_veto": 0.5},
    "veto after IcePop": {"correction": "token_masked", "correction_veto": 0.4},
    "overlong filter": {"overlong_filter": True},
    "dropped groups": {"degenerate": "drop", "aggregation": "group_token_mean"},
    "k1 in the loss": {"kl_estimator": "k1"},
    "k2 in the reward": {"kl_estimator": "k2", "kl_in": "reward"},
}


@pytest.mark.parametrize(("dp", "max_tokens", "row_multiple"), [(1, 25, 1), (3, 60, 8), (16, 40, 1)])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_gives_the_same_for_every_split(option: str, dp: int, max_tokens: int, row_multiple: int) -> None:
    data, keys = make_data(), OPTIONS[option]
    plain, _ = compute_update_loss(data, AlgorithmConfig(name=str(keys.get("name", "grpo"))))  # type: ignore[arg-type]
    whole, _ = compute_update_loss(data, AlgorithmConfig(**keys))  # type: ignore[arg-type]
    parts, _ = compute_update_loss(
        data, AlgorithmConfig(**keys), dp=dp, max_tokens=max_tokens, row_multiple=row_multiple
    )  # type: ignore[arg-type]
    assert abs(whole - plain) > 1e-4, "the option does nothing here"
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient_of(parts, data), gradient_of(whole, data), rtol=1e-12, atol=1e-14)


def test_the_entropy_bonus_is_weighted_as_the_loss() -> None:
    data = make_data()
    with_bonus, _ = compute_update_loss(data, AlgorithmConfig(entropy_coef=0.1))
    without, _ = compute_update_loss(data, AlgorithmConfig())
    expected = -0.1 * torch.stack([e.mean() for e in data.entropy]).mean()
    torch.testing.assert_close(with_bonus - without, expected, rtol=1e-6, atol=1e-7)
    found = torch.cat(torch.autograd.grad(with_bonus, data.entropy))
    wanted = torch.cat(torch.autograd.grad(expected, data.entropy))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_dual_clip_is_that_of_its_paper() -> None:
    data = make_data()

    def rollout_term(i: int) -> Tensor:
        inner = clipped_objective(data.differ(i).exp(), std_advantage(i), 0.2, 0.2)
        return (torch.maximum(inner, torch.tensor(1.3 * std_advantage(i))) if std_advantage(i) < 0 else inner).mean()

    expected = -torch.stack(stack_rollouts(rollout_term)).mean()
    found, _ = compute_update_loss(data, AlgorithmConfig(kl_coef=0.0, dual_clip=1.3))
    assert abs(found - compute_update_loss(data, AlgorithmConfig(kl_coef=0.0))[0]) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient_of(found, data), gradient_of(expected, data), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_loss_and_in_the_reward(estimator: str) -> None:
    data = make_data()
    d = stack_rollouts(lambda i: data.log_probs[i] - data.ref[i])
    kl = {"k1": d, "k2": [x**2 / 2 for x in d], "k3": [(-x).exp() + x - 1 for x in d]}[estimator]
    in_loss, _ = compute_update_loss(data, AlgorithmConfig(kl_coef=0.3, kl_estimator=estimator))
    none, _ = compute_update_loss(data, AlgorithmConfig(kl_coef=0.0))
    expected = 0.3 * torch.stack([x.mean() for x in kl]).mean()
    torch.testing.assert_close(in_loss - none, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        gradient_of(in_loss, data) - gradient_of(none, data), gradient_of(expected, data), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("form", ["token_truncated", "sequence_truncated", "token_masked"])
def test_corrections_multiply_the_surrogate_and_not_the_kl(form: str) -> None:
    data = make_data()

    def factor(i: int) -> Tensor:
        k = (data.old[i] - data.sampler[i]).exp()
        if form == "token_truncated":
            return k.clamp(max=2.0)
        if form == "sequence_truncated":
            return k.prod().clamp(max=2.0).expand_as(k)
        return k * ((k >= 0.5) & (k <= 5.0))

    parts = stack_rollouts(
        lambda i: (
            factor(i) * clipped_objective(data.differ(i).exp(), std_advantage(i), 0.2, 0.2) - 0.04 * k3(data, i)
        ).mean()
    )
    expected = -torch.stack(parts).mean()
    found, _ = compute_update_loss(data, AlgorithmConfig(correction=form))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient_of(found, data), gradient_of(expected, data), rtol=1e-6, atol=1e-7)


def test_a_veto_excludes_whole_rollouts() -> None:
    data = make_data()
    least = [float((o - s).exp().min()) for o, s in zip(data.old, data.sampler, strict=True)]
    veto = 0.5
    assert 0 < sum(k < veto for k in least) < len(least)
    parts = stack_rollouts(
        lambda i: (
            (least[i] >= veto) * clipped_objective(data.differ(i).exp(), std_advantage(i), 0.2, 0.2).mean()
            - 0.04 * k3(data, i).mean()
        )
    )
    expected = -torch.stack(parts).mean()
    found, _ = compute_update_loss(data, AlgorithmConfig(correction_veto=veto))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient_of(found, data), gradient_of(expected, data), rtol=1e-6, atol=1e-7)


def test_filtered_rollouts_are_counted_and_dropped_groups_are_not() -> None:
    data = make_data()
    parts = stack_rollouts(
        lambda i: (clipped_objective(data.differ(i).exp(), std_advantage(i), 0.2, 0.2) - 0.04 * k3(data, i)).mean()
    )
    filtered, batches = compute_update_loss(data, AlgorithmConfig(overlong_filter=True))
    torch.testing.assert_close(filtered, -torch.stack([*parts[:2], *parts[3:]]).sum() / 12, rtol=1e-6, atol=1e-7)
    assert batches[0].is_trained.tolist() == [i != 2 for i in range(12)]
    dropped, batches = compute_update_loss(data, AlgorithmConfig(degenerate="drop"))
    torch.testing.assert_close(dropped, -torch.stack([*parts[:4], *parts[8:]]).sum() / 8, rtol=1e-6, atol=1e-7)
    assert batches[0].is_trained.tolist() == [not 4 <= i < 8 for i in range(12)]

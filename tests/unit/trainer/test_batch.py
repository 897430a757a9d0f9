"""Building microbatches from rollouts: global denominators, and the same content for every split."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_mega.algorithm.advantages.group_relative import group_advantages
from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.config.load import load_config
from grpo_mega.config.schema import TrainConfig
from grpo_mega.data.row_plan import RowShape
from grpo_mega.parallel.topology import Topology
from grpo_mega.trainer.batch import TrainBatch, build_batch, explain_batch, shuffled_rewards
from grpo_mega.trainer.objective import Credit, Objective
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.types import Microbatch
from tests.helpers.random_groups import GROUP, random_groups
from tests.helpers.recorded_rollouts import RolloutGroups
from tests.helpers.thread_ranks import on_ranks
from tests.helpers.token_values import token_values

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
OBJECTIVE = Objective(AlgorithmConfig(), max_tokens=64)


def build_batches(
    groups: RolloutGroups,
    rewards: Sequence[float | None],
    dp: int,
    budget: int,
    minibatches: int = 2,
    shape: RowShape = RowShape(),  # noqa: B008 - frozen
) -> list[TrainBatch]:
    """Return one batch per data-parallel rank."""
    train = TrainConfig(steps=1, minibatches_per_epoch=minibatches, max_tokens_per_microbatch=budget)
    known = np.array([np.nan if reward is None else reward for reward in rewards])
    sampled = groups.sampled()

    def build(transfer: RolloutTransfer) -> TrainBatch:
        held = sampled.held_by(is_first=transfer.ranks.is_first)
        return build_batch(held, known, train, OBJECTIVE, transfer=transfer, shape=shape)

    return on_ranks(Topology(dp), build)


def loss_tokens(batch: TrainBatch, minibatch: int) -> Counter[tuple[int, int, float, float]]:
    """Count (rollout, predicted token, weight, advantage) over all loss tokens."""
    found: Counter[tuple[int, int, float, float]] = Counter()
    for row in batch.minibatches[minibatch]:
        mask = row.loss_mask
        labels = row.labels[mask].tolist()
        weights, advantages = row.token_weights[mask].tolist(), row.advantages[mask].tolist()
        found.update((t // 100, t, w, a) for t, w, a in zip(labels, weights, advantages, strict=True))
    return found


@pytest.mark.parametrize("shape", [RowShape(), RowShape(8), RowShape(8, 8), RowShape(1, 1, 4), RowShape(6, 6, 3)])
@pytest.mark.parametrize("dp", [1, 2, 3, 5])
@pytest.mark.parametrize("budget", [48, 100, 10_000])
def test_every_split_holds_the_same_tokens_weights_and_advantages(dp: int, budget: int, shape: RowShape) -> None:
    groups, rewards = random_groups(7)
    whole = build_batches(groups, rewards, 1, 10_000)[0]
    parts = build_batches(groups, rewards, dp, budget, shape=shape)
    for minibatch, rollouts in enumerate((range(12), range(12, 28))):
        tokens = sum((loss_tokens(part, minibatch) for part in parts), Counter())
        assert tokens == loss_tokens(whole, minibatch)
        assert {rollout for rollout, *_ in tokens} == set(rollouts)
        rows = [row for part in parts for row in part.minibatches[minibatch]]
        assert len({row.token_ids.numel() for row in rows}) == 1
        assert rows[0].token_ids.numel() % shape.row_multiple == 0
        assert rows[0].token_ids.numel() < budget + shape.row_multiple
        assert all(int(n) % shape.segment_multiple == 0 for row in rows for n in row.cu_seqlens)
        assert len(parts[0].minibatches[minibatch]) % shape.microbatch_multiple == 0
        assert len({len(part.minibatches[minibatch]) for part in parts}) == 1


@pytest.mark.parametrize("dp", [1, 3])
def test_each_rollout_has_the_total_weight_one_over_the_rollouts_of_its_minibatch(dp: int) -> None:
    groups, rewards = random_groups(7)
    for minibatch, num_rollouts in enumerate((12, 16)):
        shares: Counter[int] = Counter()
        counted: Counter[int] = Counter()
        for part in build_batches(groups, rewards, dp, 64):
            for (rollout, _, weight, _), n in loss_tokens(part, minibatch).items():
                shares[rollout] += n * weight
                counted[rollout] += n
        assert len(shares) == num_rollouts
        assert list(shares.values()) == pytest.approx([1 / num_rollouts] * num_rollouts, rel=1e-6)
        assert sum(shares.values()) == pytest.approx(1.0, rel=1e-6)
        assert all(counted[i] == len(groups.rollouts[i].completion.token_ids) for i in counted)


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_rollouts_without_a_reward_change_no_loss_in_any_split(dp: int) -> None:
    """The loss of the step is that of the rollouts with a reward; the others get no gradient."""
    groups, known = random_groups(7)
    rewards = [None if i % 5 == 0 or i // GROUP == 3 else reward for i, reward in enumerate(known)]
    parts = build_batches(groups, rewards, dp, 100, minibatches=1)
    total = 0.0
    for row in (row for part in parts for row in part.microbatches):
        ref = -0.001 * row.labels.float()
        old = ref - 0.04 * (row.labels // 100 % 5)  # the ratio of rollout i is e^(0.04 (i mod 5)), which is not clipped
        log_probs = ref.clone().requires_grad_()
        row = replace(row, old_log_probs=old, ref_log_probs=ref)
        loss = (OBJECTIVE.loss()(log_probs, torch.zeros_like(ref), row)[0] * row.token_weights).sum()
        loss.backward()
        total += loss.item()
        assert log_probs.grad is not None
        for rollout, gradient in _by_rollout(row, log_probs.grad).items():
            assert (gradient == 0).all() == (rewards[rollout] is None), rollout
    expected, num_scored = 0.0, sum(reward is not None for reward in rewards)
    for begin in range(0, 28, GROUP):
        scored = [i for i in range(begin, begin + GROUP) if rewards[i] is not None]
        advantages = group_advantages(torch.tensor([[known[i] for i in scored]]))[0].tolist() if scored else []
        for i, advantage in zip(scored, advantages, strict=True):
            expected -= advantage * math.exp(0.04 * (i % 5)) / num_scored
    assert abs(expected) > 1e-3
    assert total == pytest.approx(expected, abs=1e-6)


def _by_rollout(row: Microbatch, values: torch.Tensor) -> dict[int, torch.Tensor]:
    return {
        rollout: values[begin:end][row.loss_mask[begin:end]]
        for rollout, begin, end in zip(
            row.rollout_ids, row.cu_seqlens.tolist(), row.cu_seqlens.tolist()[1:], strict=False
        )
    }


def test_all_rows_of_a_step_have_one_length_on_all_ranks() -> None:
    groups, rewards = random_groups(7)
    rows = [row for part in build_batches(groups, rewards, 3, 64, minibatches=3) for row in part.microbatches]
    assert len(rows) > 9
    assert len({row.token_ids.numel() for row in rows}) == 1


def test_weights_and_advantages_are_zero_where_nothing_is_trained() -> None:
    groups, rewards = random_groups(5)
    for row in build_batches(groups, rewards, 2, 64)[1].microbatches:
        assert not row.token_weights[~row.loss_mask].any()
        assert not row.advantages[~row.loss_mask].any()


def test_advantages_are_those_of_the_groups() -> None:
    groups, rewards = random_groups(3)
    batch = build_batches(groups, rewards, 1, 1000)[0]
    expected = group_advantages(torch.tensor(rewards).view(3, GROUP)).flatten()
    assert batch.advantages.ids.tolist() == list(range(12))
    assert batch.mean_advantages.tolist() == expected.tolist()
    for minibatch in range(2):
        for rollout, _, _, advantage in loss_tokens(batch, minibatch):
            assert advantage == expected[rollout].item()


def test_a_rank_without_a_rollout_has_a_row_without_loss() -> None:
    groups, rewards = random_groups(1)
    parts = build_batches(groups, rewards, 6, 10_000, minibatches=1)
    assert [bool(part.microbatches[0].rollout_ids) for part in parts] == [True] * 4 + [False] * 2
    assert parts[5].microbatches[0].num_loss_tokens == 0


def test_log_probs_are_attached_to_their_own_rows() -> None:
    groups, rewards = random_groups(6)
    batch = build_batches(groups, rewards, 2, 64)[1]
    assert len(batch.microbatches) > 3
    old = [row.token_ids + 0.5 for row in batch.microbatches]
    ref = [row.token_ids + 0.25 for row in batch.microbatches]
    filled = batch.with_log_probs(old=old, ref=ref)
    assert [len(m) for m in filled.minibatches] == [len(m) for m in batch.minibatches]
    for row, before in zip(filled.microbatches, batch.microbatches, strict=True):
        assert row.old_log_probs is not None
        assert row.ref_log_probs is not None
        assert torch.equal(row.old_log_probs, row.token_ids + 0.5)
        assert torch.equal(row.ref_log_probs, row.token_ids + 0.25)
        assert before.old_log_probs is None
    kept = filled.with_log_probs(old=None, ref=None)
    assert [row.old_log_probs is old[i] for i, row in enumerate(kept.microbatches)] == [True] * len(old)
    assert [row.ref_log_probs is ref[i] for i, row in enumerate(kept.microbatches)] == [True] * len(ref)


def test_values_and_returns_are_on_the_tokens_of_their_rollouts() -> None:
    groups, rewards = random_groups(6)
    numbers = token_values([[float(t) for t in r.completion.token_ids] for r in groups.rollouts])
    halves, thirds = numbers.with_values(numbers.values / 2), numbers.with_values(numbers.values / 3)
    for part in build_batches(groups, rewards, 3, 64):
        filled = part.with_credit(Credit(thirds, halves), numbers)
        assert (filled.values, filled.returns) == (numbers, halves)
        for row in filled.microbatches:
            assert row.old_values is not None
            assert row.returns is not None
            assert torch.equal(row.old_values, torch.where(row.loss_mask, row.labels.float(), 0.0))
            assert torch.equal(row.returns, row.old_values / 2)
            torch.testing.assert_close(row.advantages, row.old_values / 3, rtol=1e-6, atol=0)


def test_completion_values_over_all_ranks_are_those_of_each_rollout() -> None:
    groups, rewards = random_groups(6)
    found: dict[int, list[float]] = {}
    for part in build_batches(groups, rewards, 3, 64):
        mine = part.completion_values([row.labels.float() for row in part.microbatches]).by_rollout()
        assert not mine.keys() & found.keys()
        found |= mine
    assert found == {i: [float(t) for t in r.completion.token_ids] for i, r in enumerate(groups.rollouts)}


def test_shuffled_rewards_are_a_permutation_fixed_by_the_seed() -> None:
    rewards = np.arange(50.0)
    shuffled = shuffled_rewards(rewards, seed=3).tolist()
    assert shuffled != rewards.tolist()
    assert sorted(shuffled) == rewards.tolist()
    assert shuffled_rewards(rewards, seed=3).tolist() == shuffled
    assert shuffled_rewards(rewards, seed=4).tolist() != shuffled


def test_rollouts_without_a_reward_stay_without_when_rewards_are_shuffled() -> None:
    rewards = np.array([math.nan if i % 3 == 0 else float(i) for i in range(50)])
    shuffled = shuffled_rewards(rewards, seed=3)
    known = ~np.isnan(shuffled)
    assert known.tolist() == [i % 3 != 0 for i in range(50)]
    assert sorted(shuffled[known].tolist()) == [float(i) for i in range(50) if i % 3]
    assert shuffled[known].tolist() != rewards[known].tolist()


def test_the_description_of_a_step_has_the_hand_computed_numbers() -> None:
    overrides = [
        "data.prompts_per_step=10", "sampling.group_size=4", "sampling.prompts_per_wave=4", "train.steps=5",
        "train.epochs_per_rollout=2", "train.minibatches_per_epoch=3", "train.max_tokens_per_microbatch=512",
    ]  # fmt: skip
    config = load_config(CONFIGS / "quickstart.yaml", overrides)
    assert explain_batch(config, Topology(8, tp=2, pp=1, engine_tp=4)).splitlines() == [
        "a step: 10 prompts x 4 rollouts = 40 rollouts, 3 wave(s) over 2 engine replica(s) of 4 rank(s)",
        "updates: 2 epoch(s) x 3 minibatch(es) = 6 optimizer step(s) per step, 30 in total",
        "an update: 12 or 16 rollouts over 4 data-parallel rank(s), in rows of at most 512 tokens",
        "its loss: mean over a rollout's completion tokens, then mean over the update's rollouts (denominator: "
        "12 or 16), the same for every layout",
        "learning rate: 0.0002, linear decay to 1e-05 at update 400",
    ]

"""Log-probs before the update, from a pass of their own or from the first forward pass, in real policies."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.config.guard_section import GuardConfig
from grpo_mega.config.schema import TrainConfig
from grpo_mega.data.row_plan import RowShape
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.trainer.batch import TrainBatch, build_batch
from grpo_mega.trainer.learning import sampled_old_log_probs, update, with_log_probs
from grpo_mega.trainer.loop import TrainerState
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.trainer.run_guard import RunGuard
from grpo_mega.types import Rollout, UpdateStats
from tests.helpers.recorded_rollouts import (
    ONE,
    OPTIMIZER,
    OVERLAP,
    Layout,
    Recorded,
    RolloutGroups,
    open_policy,
    ranks_of,
    shard_digests,
)
from tests.parallel.conftest import Laboratory

LAYOUTS = [ONE, Layout(4, pp=2, vpp=2, cp=2, more=OVERLAP)]
LONG = [pytest.param(Layout(4, tp=2, pp=2), marks=pytest.mark.long)]


def job_and_batch(
    rank: int, recorded: Recorded, layout: Layout, algorithm: AlgorithmConfig, epochs: int
) -> tuple[TrainerState, Objective, TrainBatch]:
    train = TrainConfig(
        steps=1, epochs_per_rollout=epochs, minibatches_per_epoch=2, max_tokens_per_microbatch=recorded.max_tokens
    )
    objective, ranks = Objective(algorithm, max_tokens=recorded.max_tokens), ranks_of(rank, layout)
    policy = open_policy(rank, recorded, layout)
    config = SimpleNamespace(train=train, optimizer=OPTIMIZER, algorithm=algorithm)
    transfer = RolloutTransfer(ArrayCollectives(ranks))
    guard = RunGuard(GuardConfig(), ranks)
    parts = SimpleNamespace(policy=policy, config=config, ranks=ranks, transfer=transfer, guard=guard)
    job = cast("TrainerState", parts)
    groups = recorded.groups.sampled().held_by(is_first=ranks.is_first)
    shape = RowShape.of(layout.parallel)
    batch = build_batch(groups, np.array(recorded.rewards), train, objective, transfer=transfer, shape=shape)
    return job, objective, batch


def run(
    rank: int, recorded: Recorded, layout: Layout, algorithm: AlgorithmConfig, whole_pass: bool
) -> tuple[list[UpdateStats], dict[int, list[float]], dict[str, int]]:
    """Run two epochs of two updates; with `whole_pass` one pass computes the log-probs of both minibatches first."""
    job, objective, batch = job_and_batch(rank, recorded, layout, algorithm, epochs=2)
    if whole_pass:
        batch = batch.with_log_probs(old=job.policy.log_probs(batch.microbatches), ref=None)
    else:
        batch = with_log_probs(job, objective, batch)
    batch, stats = update(job, objective.loss(), batch, 0)
    old = sampled_old_log_probs(job, batch, recorded.groups.sampled().table)
    return stats, old.by_rollout(), shard_digests(job.policy)


@pytest.mark.parametrize("layout", [*LAYOUTS, *LONG], ids=str)
def test_updates_are_bit_equal_to_those_after_a_pass_over_all_minibatches(
    laboratory: Laboratory, layout: Layout
) -> None:
    recorded, algorithm = laboratory.recorded("deep"), AlgorithmConfig(kl_coef=0.0)
    answers = [
        laboratory.pool.call(layout.world, run, recorded, layout, algorithm, whole_pass) for whole_pass in (True, False)
    ]
    assert answers[0] == answers[1]
    stats, old, _ = answers[1][0]
    assert len(stats) == 4
    assert list(old) == list(range(16))
    assert [len(values) for values in old.values()] == [r.completion.num_loss_tokens for r in recorded.groups.rollouts]
    assert not any(found for _, found, _ in answers[1][1:]), "only the rank that sampled has them"
    assert stats[0].maxima["ratio"] == 1.0, "the policy before the update is the old policy"
    assert stats[1].maxima["ratio"] != 1.0, "the second minibatch is compared with the policy before the first update"


def sampled_by_the_policy(recorded: Recorded, log_probs: list[list[float]], shift: float) -> Recorded:
    """Return the rollouts with these log-probs as the sampler's, one token of each shifted."""

    def of(rollout: Rollout, values: list[float]) -> Rollout:
        completion = rollout.completion
        own = iter([values[0] + shift, *values[1:]])
        mask = np.ones(len(completion.token_ids)) if completion.loss_mask is None else completion.loss_mask
        sampled = [next(own) if used else 0.0 for used in mask]
        return replace(rollout, completion=replace(completion, sampler_log_probs=sampled))

    groups = recorded.groups
    rollouts = [of(r, v) for r, v in zip(groups.rollouts, log_probs, strict=True)]
    return replace(recorded, groups=RolloutGroups(rollouts, groups.group_size))


def test_with_the_log_probs_of_the_sampler_layouts_agree_and_the_ratio_contains_the_mismatch(
    laboratory: Laboratory,
) -> None:
    recorded = laboratory.recorded("deep")
    known = laboratory.pool.call(1, run, recorded, ONE, AlgorithmConfig(kl_coef=0.0), True)[0][1]
    shifted = sampled_by_the_policy(recorded, list(known.values()), shift=-0.1)
    algorithm = AlgorithmConfig(kl_coef=0.0, old_log_probs="sampler", correction_low=0.2, correction_high=3.0)
    found: list[Any] = [
        laboratory.pool.call(layout.world, run, shifted, layout, algorithm, False)[0] for layout in LAYOUTS
    ]
    for stats, old, _ in found:
        assert stats[0].maxima["ratio"] == pytest.approx(1.1052, abs=1e-3)  # exp(0.1): policy over sampler
        for of_this, of_one in zip(stats, found[0][0], strict=True):
            assert of_this.grad_norm == pytest.approx(of_one.grad_norm, rel=1e-4)
            assert of_this.sums["correction"] == pytest.approx(of_one.sums["correction"], rel=1e-6)
        assert list(old) == list(range(8))  # those of the first of two minibatches
        assert all(values == pytest.approx(known[i], abs=1e-4) for i, values in old.items())

"""The log-probs of a step and the critic's part of it: order of calls, learning rates, and the values in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.config.guard_section import GuardConfig
from grpo_mega.config.policy_sections import OptimizerConfig
from grpo_mega.config.schema import TrainConfig
from grpo_mega.data.row_plan import RowShape
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.batch import build_batch
from grpo_mega.trainer.learning import sampled_old_log_probs, update, update_critic, with_log_probs
from grpo_mega.trainer.loop import TrainerState, state_bytes
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.run_guard import RunGuard
from grpo_mega.types import Completion, Microbatch, Prompt, Reward, Rollout, UpdateStats
from tests.helpers.thread_ranks import one_rank
from tests.helpers.token_values import as_lists

TRAIN = TrainConfig(steps=1, epochs_per_rollout=2, minibatches_per_epoch=2, max_tokens_per_microbatch=20)


class FakeCritic:
    """Critic whose value of a token is the token id; records its updates."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def values(self, microbatches: list[Microbatch]) -> list[Tensor]:
        self.calls.append(("values", len(microbatches)))
        return [m.labels.float() for m in microbatches]

    def update(self, microbatches: list[Microbatch], loss: Any, learning_rate: float, allows: Any) -> UpdateStats:
        self.calls.append((tuple(i for m in microbatches for i in m.rollout_ids), learning_rate))
        for m in microbatches:
            assert m.old_values is not None
            assert m.returns is not None
            assert torch.equal(m.old_values, torch.where(m.loss_mask, m.labels.float(), 0.0))
            loss(m.old_values, m)
        return UpdateStats(1.0, learning_rate, {}, {})

    def state_bytes(self) -> dict[str, int]:
        return {"params": 5}


def job_of(critic: FakeCritic | None) -> TrainerState:
    @contextmanager
    def valuing() -> Iterator[None]:
        assert critic is not None
        critic.calls.append("device")
        yield
        critic.calls.append("host")

    optimizer = OptimizerConfig(lr=1.0, decay_updates=10)
    return cast(
        "TrainerState",
        SimpleNamespace(
            critic=critic,
            policy=SimpleNamespace(state_bytes=lambda: {"params": 3, "grads": 4}),
            phases=SimpleNamespace(valuing=valuing),
            timers=PhaseTimer(),
            config=SimpleNamespace(train=TRAIN, optimizer=optimizer),
            ranks=one_rank().ranks,
            transfer=one_rank(),
            guard=RunGuard(GuardConfig(), one_rank().ranks),
        ),
    )


def step_of(algorithm: AlgorithmConfig) -> tuple[Objective, SampledGroups, Any]:
    rollouts = [
        Rollout(Prompt(i // 2, "", (1, 2), ""), Completion((3,) * n, (0.0,) * n, "eos", 0, ""), Reward(float(i % 2)), 0)
        for i, n in enumerate([1, 3, 2, 2])
    ]
    groups, objective = SampledGroups.of(rollouts, 2), Objective(algorithm, max_tokens=8)
    batch = build_batch(groups, groups.table.reward, TRAIN, objective, transfer=one_rank(), shape=RowShape())
    return objective, groups, batch


def test_the_critic_computes_values_and_is_updated_while_it_has_the_device() -> None:
    critic = FakeCritic()
    objective, groups, batch = step_of(AlgorithmConfig(name="ppo", kl_coef=0.0, critic_lr_factor=2.0))
    batch, updates = update_critic(job_of(critic), objective, batch, groups, policy_version=2)
    minibatches = [(0, 1), (2, 3)]  # two epochs of two
    rates = pytest.approx([1.6, 1.4, 1.2, 1.0])  # twice the policy's, which falls by a tenth with each update
    assert critic.calls[:2] == ["device", ("values", 2)]
    assert critic.calls[-1] == "host"
    assert [ids for ids, _ in critic.calls[2:-1]] == minibatches * 2
    assert [u.learning_rate for u in updates] == rates
    assert as_lists(batch.values) == [[3.0] * n for n in (1, 3, 2, 2)]
    assert as_lists(batch.returns)[0] == pytest.approx([0.0])
    assert batch.advantages.values.sum() == pytest.approx(0.0, abs=1e-6)
    assert batch.microbatches[0].advantages[batch.microbatches[0].loss_mask].abs().min() > 0


def test_without_a_critic_nothing_changes() -> None:
    objective, groups, batch = step_of(AlgorithmConfig())
    assert update_critic(job_of(None), objective, batch, groups, policy_version=0) == (batch, [])


def test_state_bytes_covers_policy_and_critic() -> None:
    assert state_bytes(job_of(None)) == {"policy_params": 3, "policy_grads": 4}
    assert state_bytes(job_of(FakeCritic())) == {"policy_params": 3, "policy_grads": 4, "critic_params": 5}


class FakePolicy:
    """Policy whose log-prob of a token is minus the number of updates so far; records the rows of its passes."""

    def __init__(self, *, on_last_stage: bool = True) -> None:
        self.passes: list[tuple[int, ...]] = []
        self.old: list[float | None] = []
        self._updates, self._on_last_stage = 0, on_last_stage

    def _log_probs(self, microbatches: list[Microbatch]) -> list[Tensor] | None:
        return (
            [torch.full((len(m.labels),), -float(self._updates)) for m in microbatches] if self._on_last_stage else None
        )

    @contextmanager
    def reference(self) -> Iterator[None]:
        yield

    def log_probs(self, microbatches: list[Microbatch]) -> list[Tensor] | None:
        self.passes.append(tuple(i for m in microbatches for i in m.rollout_ids))
        return self._log_probs(microbatches)

    def update(
        self, microbatches: list[Microbatch], loss: Any, rate: float, allows: Any
    ) -> tuple[UpdateStats, list[Tensor] | None]:
        self.old += [None if m.old_log_probs is None else m.old_log_probs[0].item() for m in microbatches]
        found = self._log_probs(microbatches)
        self._updates += 1
        return UpdateStats(1.0, rate, {}, {}), found


def run_updates(algorithm: AlgorithmConfig, policy: FakePolicy) -> dict[int, list[float]]:
    objective, groups, batch = step_of(algorithm)
    job = job_of(None)
    job.policy, job.config.algorithm = policy, algorithm  # type: ignore[misc, assignment]
    batch = with_log_probs(job, objective, batch)
    batch, stats = update(job, objective.loss(), batch, 0)
    assert len(stats) == 4
    return sampled_old_log_probs(job, batch, groups.table).by_rollout()


WITHOUT_REFERENCE = {"kl_coef": 0.0}


def test_the_first_minibatch_gets_its_old_log_probs_from_the_first_update() -> None:
    policy = FakePolicy()
    found = run_updates(AlgorithmConfig(**WITHOUT_REFERENCE), policy)
    assert policy.passes == [(2, 3)]  # of two minibatches with two rollouts
    assert policy.old == [None, 0.0, 0.0, 0.0]  # the second epoch reads those of the first update
    assert found == {i: [0.0] * n for i, n in enumerate((1, 3, 2, 2))}


def test_a_penalty_in_the_reward_needs_the_log_probs_of_all_minibatches_first() -> None:
    policy = FakePolicy()
    run_updates(AlgorithmConfig(kl_in="reward", kl_coef=0.1), policy)
    assert policy.passes == [(0, 1, 2, 3)] * 2  # reference and policy
    assert policy.old == [0.0] * 4


def test_with_the_log_probs_of_the_sampler_no_pass_is_made_and_the_others_stay_unknown() -> None:
    policy = FakePolicy()
    found = run_updates(AlgorithmConfig(old_log_probs="sampler", **WITHOUT_REFERENCE), policy)
    assert policy.passes == []
    assert found == {0: [0.0], 1: [0.0] * 3}  # the second minibatch is computed after an update


def test_a_stage_without_log_probs_makes_the_same_passes() -> None:
    policy = FakePolicy(on_last_stage=False)
    objective, _, batch = step_of(AlgorithmConfig(**WITHOUT_REFERENCE))
    job = job_of(None)
    job.policy = policy  # type: ignore[misc, assignment]
    batch, _ = update(job, objective.loss(), with_log_probs(job, objective, batch), 0)
    assert policy.passes == [(2, 3)]
    assert policy.old == [None] * 4

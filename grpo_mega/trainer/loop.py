"""The training loop: sample, score, compute advantages, update, sync weights. Every rank runs the same program.

The differences between backends, precisions and algorithms are inside the objects of a `TrainerState`. A step is a pure
function of the saved state (weights and optimizer of policy and critic, reference, `LoopState`) and of run.seed;
therefore a resumed run equals an uninterrupted one.
Asserted by tests/unit/trainer/test_loop.py and tests/e2e/test_resume.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from grpo_mega.algorithm.base import OwnTokens
from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.config.schema import Config
from grpo_mega.data.pack import unpack
from grpo_mega.data.rollout_table import RolloutTable
from grpo_mega.data.row_plan import RolloutCost, RowShape
from grpo_mega.interfaces import Critic, Policy, TokenLoss
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.rollout.dynamic_sampling import GroupSource
from grpo_mega.rollout.evaluator import Evaluator
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.sampler import derived_seed
from grpo_mega.trainer.batch import TrainBatch, build_batch, kl_penalties, shuffled_rewards
from grpo_mega.trainer.guarded_step import check_rollouts, finish_guarded_step
from grpo_mega.trainer.learning_rate import LearningRateSchedule
from grpo_mega.trainer.mismatch import Differences
from grpo_mega.trainer.mismatch_guard import MismatchGuard
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.phases import Phases
from grpo_mega.trainer.reporter import Observer
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.trainer.run_guard import RunGuard
from grpo_mega.trainer.save_points import SavePoints
from grpo_mega.trainer.step_metrics import IsRight, StepResult
from grpo_mega.trainer.token_metrics import token_metrics
from grpo_mega.types import TokenValues, UpdateStats
from grpo_mega.weight_sync.sync import SyncReport, WeightSync


@dataclass(frozen=True)
class TrainerState:
    """Objects of one run on this rank.

    `evaluator` is None without held-out prompts. `critic` is None unless `algorithm.advantage` is gae. `cost` has the
    operations of a rollout, by which the work is balanced.
    """

    config: Config
    ranks: Ranks
    groups: GroupSource
    policy: Policy
    critic: Critic | None
    objective: Objective
    phases: Phases
    sync: WeightSync
    saves: SavePoints
    evaluator: Evaluator | None
    timers: PhaseTimer
    observer: Observer
    guard: RunGuard
    is_right: IsRight
    mismatch_guard: MismatchGuard
    transfer: RolloutTransfer
    cost: RolloutCost = field(default_factory=RolloutCost)


def train(job: TrainerState, state: LoopState) -> LoopState:
    """Train from `state` to `train.steps`. The engines must hold the policy's weights.

    Raises:
        Stopped: on every rank, with a complete checkpoint, if one rank has received a stop request.
        EngineMismatchError: on every rank, before the checkpoint of a step whose engine differs from the policy.
        GuardStopError, RollbackRequest: on every rank, before the checkpoint of a step in which a rule of `guard.rules`
            with this action held.
    """
    config, timers = job.config, job.timers
    job.saves.start(state)
    for step in range(state.step + 1, config.train.steps + 1):
        timers.start_step()
        job.guard.start_step(step)
        with job.phases.sampling(), timers.phase("rollout"):
            rollbacks = job.guard.rollbacks
            groups = job.groups.sample(step, rollbacks.prompts_step_of(step), rollbacks.attempt_of(step))
        job.saves.stop_before_updates(job.policy, state)
        check_rollouts(job.guard, groups, job.is_right)
        objective = job.objective.at(state.kl_coef)
        with job.phases.training():
            batch = make_batch(job, objective, groups, step)
            with timers.phase("log_probs"):
                batch = with_log_probs(job, objective, batch)
            batch, critic_updates = update_critic(job, objective, batch, groups, state.policy_version)
            with timers.phase("train"):
                batch, updates = update(job, objective.loss(), batch, state.policy_version)
                update_reference_if_due(job, step)
            old_log_probs = sampled_old_log_probs(job, batch, groups.table)
        differences, gather = Differences.of(groups.tokens, old_log_probs), job.transfer.collectives.gather
        if not job.guard.skipped_non_finite:  # the log-probs of the policy may not be finite
            job.mismatch_guard.check(step, differences, groups.table, gather, job.sync.describe_checks())
        of_tokens = token_metrics(differences, groups, batch, job.transfer)
        guarded = finish_guarded_step(job.guard, groups, updates, of_tokens, job.transfer.collectives.sum)
        state = state.after(step, len(updates), objective.next_kl_coef(updates))
        job.saves.after_updates(job.policy, state)  # before the sync: the engine still sleeps, and loses no weights
        synced = push_weights(job, state)
        evaluate_if_due(job, step)
        kl_coef = objective.algorithm.kl_coef
        waited = job.saves.wait_seconds
        result = StepResult(
            step,
            groups,
            batch,
            old_log_probs,
            mean_advantages(job, batch),
            updates,
            synced,
            kl_coef,
            of_tokens,
            critic_updates,
            state_bytes(job),
            waited,
            guarded,
        )
        job.observer.step(result)
        job.saves.end_step(step)
    return state


def make_batch(job: TrainerState, objective: Objective, groups: SampledGroups, step: int) -> TrainBatch:
    """Build this rank's packed rows with advantages and token weights. Collective.

    Args:
        job: config and coordinates of this rank.
        objective: computes advantages and token weights.
        groups: rollouts of the step.
        step: number of the step, the seed of `reward.shuffle`.

    Raises:
        ValueError: a reward, a step value or an advantage is not finite.
    """
    rewards = groups.table.reward
    if job.config.reward.shuffle:
        rewards = shuffled_rewards(rewards, derived_seed("shuffle", job.config.run.seed, step))
    return build_batch(
        groups,
        rewards,
        job.config.train,
        objective,
        transfer=job.transfer,
        shape=RowShape.of(job.config.parallel, job.config.precision),
        cost=job.cost,
    )


def with_log_probs(job: TrainerState, objective: Objective, batch: TrainBatch) -> TrainBatch:
    """Add the log-probs of the reference, and those of the policy before the update where a separate pass is needed.

    The first update of the step has the weights from before the update, so that its own forward pass gives the
    log-probs of the first minibatch (`update`). A penalty in the reward needs those of all minibatches before it. With
    `algorithm.old_log_probs=sampler` no pass is made.
    """
    ref = None
    if objective.algorithm.needs_reference:
        with job.policy.reference():
            ref = job.policy.log_probs(batch.microbatches)
    skipped = 0 if objective.kl_in_reward else len(batch.minibatches[0])
    later, old = batch.microbatches[skipped:], None
    if objective.algorithm.old_log_probs == "policy" and later:
        found = job.policy.log_probs(later)
        old = None if found is None else [*[None] * skipped, *found]
    return batch.with_log_probs(old=old, ref=ref)


def update_critic(
    job: TrainerState, objective: Objective, batch: TrainBatch, groups: SampledGroups, policy_version: int
) -> tuple[TrainBatch, list[UpdateStats]]:
    """Set the advantages that need log-probs or values, and update the critic on this batch.

    Args:
        job: critic, phases and timers.
        objective: computes advantages, returns and the critic's loss.
        batch: rows with the log-probs of the policy and of the reference, [T] in nats.
        groups: rollouts of the step.
        policy_version: number of updates before this step, which selects the learning rate.

    Returns:
        The batch with advantages, values and returns, and the statistics of the critic's updates that were made (empty
        without a critic).

    Raises:
        GuardStopError, RollbackRequest: the critic's loss or gradient is not finite, and the rule has this action.
    """
    own = OwnTokens(batch.positions, gather=job.transfer.collectives.gather_losses)
    totals = None
    if objective.kl_in_reward:
        penalties, totals = kl_penalties(objective, batch, job.transfer)
        own = replace(own, penalties=penalties)
    if job.critic is None:
        if totals is not None:
            batch = batch.with_credit(objective.credit(groups, batch.rewards, own, totals))
        return batch, []
    with job.phases.valuing(), job.timers.phase("critic"):
        rows_of_values = job.critic.values(batch.microbatches)
        found = None if rows_of_values is None else batch.completion_values(rows_of_values)
        values = job.transfer.in_replica(found, batch.positions)
        batch = batch.with_credit(objective.credit(groups, batch.rewards, replace(own, values=values), totals), values)
        loss, stats = objective.value_loss(), list[UpdateStats]()
        schedule = LearningRateSchedule.of(job.config.optimizer, job.config.train)
        for _ in range(job.config.train.epochs_per_rollout):
            for minibatch in batch.minibatches:
                rate = objective.critic_rate(schedule.rate(policy_version + len(stats)))
                allows = job.guard.allows([m.rollout_ids for m in minibatch], of_critic=True)
                stats.append(job.critic.update(minibatch, loss, rate, allows))
    return batch, [each for each in stats if each.is_made]


def state_bytes(job: TrainerState) -> dict[str, int]:
    """Return the bytes of parameters, gradients and optimizer state of policy and critic on this rank."""
    learners = {"policy": job.policy, "critic": job.critic}
    return {
        f"{name}_{part}": size
        for name, learner in learners.items()
        if learner is not None
        for part, size in learner.state_bytes().items()
    }


class UpdatingJob(Protocol):
    """The part of a job that `update` needs."""

    @property
    def config(self) -> Config:
        """Sections train and optimizer."""
        ...

    @property
    def policy(self) -> Policy:
        """Policy of this rank."""
        ...

    @property
    def guard(self) -> RunGuard:
        """Rules on each update."""
        ...


class SyncingJob(Protocol):
    """The part of a job that `push_weights` needs."""

    @property
    def config(self) -> Config:
        """Section weight_sync."""
        ...

    @property
    def phases(self) -> Phases:
        """State of the device."""
        ...

    @property
    def sync(self) -> WeightSync:
        """Connection of policy and engines."""
        ...

    @property
    def timers(self) -> PhaseTimer:
        """Timer of the phase `sync`."""
        ...


def update(
    job: UpdatingJob, loss: TokenLoss, batch: TrainBatch, policy_version: int
) -> tuple[TrainBatch, list[UpdateStats]]:
    """Make all optimizer steps on this batch: every minibatch once per epoch.

    Args:
        job: policy and config.
        loss: loss per token.
        batch: rows of this rank.
        policy_version: number of updates before this step, which selects the learning rate.

    Returns:
        The batch with the `old_log_probs` of its first minibatch ([T] in nats), from the forward pass of the first
        update, and the statistics of each update that was made.

    Raises:
        GuardStopError, RollbackRequest: a rule of `guard.rules` with this action holds for an update.
    """
    stats, num_made = list[UpdateStats](), 0
    schedule = LearningRateSchedule.of(job.config.optimizer, job.config.train)
    for _ in range(job.config.train.epochs_per_rollout):
        for i in range(len(batch.minibatches)):
            rate = schedule.rate(policy_version + num_made)
            allows = job.guard.allows([m.rollout_ids for m in batch.minibatches[i]])
            stat, log_probs = job.policy.update(batch.minibatches[i], loss, rate, allows)
            if not stats and log_probs is not None and batch.microbatches[0].old_log_probs is None:
                later = len(batch.microbatches) - len(log_probs)
                batch = batch.with_log_probs(old=[*log_probs, *[None] * later], ref=None)
            stats.append(stat)
            num_made += stat.is_made
    return batch, [each for each in stats if each.is_made]


def update_reference_if_due(job: TrainerState, step: int) -> None:
    """Copy the policy to the reference every `algorithm.ref_update_every` steps."""
    every = job.config.algorithm.ref_update_every
    if every and step % every == 0:
        job.policy.update_reference()


def push_weights(job: SyncingJob, state: LoopState) -> SyncReport:
    """Send the policy's weights to the engines, with the verification that `weight_sync.verify` selects.

    Raises:
        WeightMismatchError: an engine's weights differ from the policy's (names tensor, rank and slice).
        RuntimeError: a rank exited, timed out or failed.
    """
    verify = job.config.weight_sync.verify
    with job.phases.syncing(), job.timers.phase("sync"):
        return job.sync.push(
            state.policy_version, verify=verify == "every" or (verify == "first" and not job.sync.count)
        )


def evaluate_if_due(job: TrainerState, step: int) -> None:
    """Evaluate every `evaluation.every` steps. The first and the last evaluation are outside of the loop."""
    every = job.config.evaluation.every
    if job.evaluator is not None and every is not None and step % every == 0 and step < job.config.train.steps:
        with job.phases.sampling(), job.timers.phase("evaluation"):
            evaluation = job.evaluator.evaluate()
        job.observer.evaluated(evaluation)


def sampled_old_log_probs(job: TrainerState, batch: TrainBatch, table: RolloutTable) -> TokenValues:
    """Return the log-probs of the policy that sampled, nats, of the rollouts that this rank sampled. Collective.

    With `algorithm.old_log_probs=sampler` they are known for the first minibatch only, and the others are left out.
    """
    trainer, microbatches = batch.plan.trainer, batch.microbatches
    if job.config.algorithm.old_log_probs == "sampler":
        trainer = np.where(batch.plan.minibatch == 0, trainer, -1)
        microbatches = batch.minibatches[0]
    found = None
    if job.ranks.is_last_stage:
        rows = [m.old_log_probs for m in microbatches]
        assert all(row is not None for row in rows), "the last pipeline stage lacks the log-probs of a microbatch"
        found = unpack([row for row in rows if row is not None], microbatches)
    return job.transfer.to_samplers(found, table, trainer)


def mean_advantages(job: TrainerState, batch: TrainBatch) -> NDArray[np.float64]:
    """Return the mean advantage of each rollout of the step over its loss tokens, [R]. Collective."""
    return job.transfer.sum_per_rollout(batch.mean_advantages, batch.positions.ids, len(batch.rewards))

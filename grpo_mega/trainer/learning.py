"""The training part of a step: batch, log-probs, critic, updates, reference. It needs no engine and no rewards.

The training loop calls `learn` with the groups that it sampled, and `grpo-mega replay` with the groups of a rollout
file. Asserted by tests/unit/trainer/test_loop.py, tests/parallel/test_old_log_probs.py and tests/e2e/test_replay.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from grpo_mega.algorithm.base import OwnTokens
from grpo_mega.config.schema import Config
from grpo_mega.data.pack import unpack
from grpo_mega.data.rollout_table import RolloutTable
from grpo_mega.data.row_plan import RolloutCost, RowShape
from grpo_mega.interfaces import Critic, Policy, TokenLoss
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.sampler import derived_seed
from grpo_mega.trainer.batch import TrainBatch, build_batch, kl_penalties, shuffled_rewards
from grpo_mega.trainer.learning_rate import LearningRateSchedule
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.phases import Phases
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.trainer.run_guard import RunGuard
from grpo_mega.types import TokenValues, UpdateStats


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


class LearningJob(UpdatingJob, Protocol):
    """The part of a job that `learn` needs."""

    @property
    def critic(self) -> Critic | None:
        """Critic of this rank, if the algorithm has one."""
        ...

    @property
    def phases(self) -> Phases:
        """State of the device."""
        ...

    @property
    def timers(self) -> PhaseTimer:
        """Timers of the phases `log_probs`, `critic` and `train`."""
        ...

    @property
    def transfer(self) -> RolloutTransfer:
        """Transfers of this rank."""
        ...

    @property
    def cost(self) -> RolloutCost:
        """Operations of a rollout, by which the work is balanced."""
        ...


@dataclass(frozen=True)
class LearnedStep:
    """Results of the training part of a step.

    Attributes:
        batch: rows of this rank, with log-probs and advantages.
        updates: statistics of the policy's updates that were made.
        critic_updates: those of the critic; empty without one.
        old_log_probs: before the update, of the rollouts that this rank sampled, where they are known; nats.
    """

    batch: TrainBatch
    updates: list[UpdateStats]
    critic_updates: list[UpdateStats]
    old_log_probs: TokenValues


def learn(job: LearningJob, objective: Objective, groups: SampledGroups, step: int, policy_version: int) -> LearnedStep:
    """Train on the groups of a step. Collective.

    Args:
        job: objects of this rank.
        objective: advantages and loss of the step.
        groups: rollouts of the step.
        step: number of the step.
        policy_version: number of updates before this step.

    Raises:
        ValueError: a reward, a step value or an advantage is not finite.
        GuardStopError, RollbackRequest: a rule of `guard.rules` with this action holds for an update.
    """
    with job.phases.training():
        batch = make_batch(job, objective, groups, step)
        with job.timers.phase("log_probs"):
            batch = with_log_probs(job, objective, batch)
        batch, critic_updates = update_critic(job, objective, batch, groups, policy_version)
        with job.timers.phase("train"):
            batch, updates = update(job, objective.loss(), batch, policy_version)
            update_reference_if_due(job, step)
        old_log_probs = sampled_old_log_probs(job, batch, groups.table)
    return LearnedStep(batch, updates, critic_updates, old_log_probs)


def make_batch(job: LearningJob, objective: Objective, groups: SampledGroups, step: int) -> TrainBatch:
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


def with_log_probs(job: LearningJob, objective: Objective, batch: TrainBatch) -> TrainBatch:
    """Add the log-probs of the reference, and those of the policy before the update where a separate pass is needed.

    The first update of the step has the weights from before the update, so that its own forward pass gives the
    log-probs of the first minibatch (`update`). A penalty in the reward needs those of all minibatches before it. With
    `algorithm.old_log_probs=sampler` no pass is made.
    """
    ref = None
    if objective.algorithm.needs_reference:
        with job.policy.reference():
            ref = job.policy.log_probs(batch.microbatches)
    skipped = 0 if objective.kl_in_reward else batch.plan.num_rows[0]
    later, old = batch.microbatches[skipped:], None
    if objective.algorithm.old_log_probs == "policy" and later:
        found = job.policy.log_probs(later)
        old = None if found is None else [*[None] * skipped, *found]
    return batch.with_log_probs(old=old, ref=ref)


def update_critic(
    job: LearningJob, objective: Objective, batch: TrainBatch, groups: SampledGroups, policy_version: int
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
                allows = job.guard.allows(minibatch.rollout_ids, of_critic=True)
                stats.append(job.critic.update(minibatch, loss, rate, allows))
    return batch, [each for each in stats if each.is_made]


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
            minibatch, rate = batch.minibatches[i], schedule.rate(policy_version + num_made)
            stat, log_probs = job.policy.update(minibatch, loss, rate, job.guard.allows(minibatch.rollout_ids))
            if not stats and log_probs is not None and not batch.microbatches.has_old_log_probs(0):
                later = len(batch.microbatches) - len(log_probs)
                batch = batch.with_log_probs(old=[*log_probs, *[None] * later], ref=None)
            stats.append(stat)
            num_made += stat.is_made
    return batch, [each for each in stats if each.is_made]


def update_reference_if_due(job: LearningJob, step: int) -> None:
    """Copy the policy to the reference every `algorithm.ref_update_every` steps."""
    every = job.config.algorithm.ref_update_every
    if every and step % every == 0:
        job.policy.update_reference()


def sampled_old_log_probs(job: LearningJob, batch: TrainBatch, table: RolloutTable) -> TokenValues:
    """Return the log-probs of the policy that sampled, nats, of the rollouts that this rank sampled. Collective.

    With `algorithm.old_log_probs=sampler` they are known for the first minibatch only, and the others are left out.
    """
    trainer, microbatches = batch.plan.trainer, batch.microbatches
    if job.config.algorithm.old_log_probs == "sampler":
        trainer = np.where(batch.plan.minibatch == 0, trainer, -1)
        microbatches = batch.minibatches[0]
    found = None
    if job.transfer.ranks.is_last_stage:
        rows = [row for row in microbatches.old_log_probs or () if row is not None]
        assert len(rows) == len(microbatches), "the last pipeline stage lacks the log-probs of a microbatch"
        found = unpack(rows, microbatches)
    return job.transfer.to_samplers(found, table, trainer)


def mean_advantages(job: LearningJob, batch: TrainBatch) -> NDArray[np.float64]:
    """Return the mean advantage of each rollout of the step over its loss tokens, [R]. Collective."""
    return job.transfer.sum_per_rollout(batch.mean_advantages, batch.positions.ids, len(batch.rewards))

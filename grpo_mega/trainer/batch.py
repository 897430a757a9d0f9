"""Builds the microbatches of this rank from the rollouts of a step: token weights, plan, transfer, packing, advantages.

Token weights and the plan are pure arithmetic on the table that every rank has, so all ranks compute the same. The
tokens of a rollout then go from the rank that sampled it to the ranks that train it, and to no other. Minibatches
consist of whole groups, and each has its own denominators. All rows of a step have the same length on all ranks,
because pipeline stages exchange tensors of one shape.
Asserted by tests/unit/trainer/test_batch.py and tests/parallel/test_rollout_transfer.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grpo_mega.algorithm.base import OwnTokens
from grpo_mega.config.schema import Config, TrainConfig
from grpo_mega.data.pack import unpack
from grpo_mega.data.rollout_tokens import RolloutTokens, offsets_of, sums_per_rollout
from grpo_mega.data.rollout_values import LossTokenValues, mean_values
from grpo_mega.data.row_plan import RolloutCost, RowShape, StepPlan, plan_step, split_minibatches
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.learning_rate import LearningRateSchedule
from grpo_mega.trainer.objective import Credit, Objective
from grpo_mega.trainer.packed_rows import PackedRows
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.types import TokenValues


@dataclass(frozen=True)
class TrainBatch:
    """Rows of this rank for one step.

    Attributes:
        microbatches: all rows, minibatch by minibatch. A row is packed when it is read.
        plan: place of the rollouts of all ranks.
        positions: of the loss tokens of this rank's rollouts in their completions.
        rewards: [R] from which the advantages are computed, before the overlong penalty; NaN: not scored.
        is_trained: [R] False for rollouts without loss.
    """

    microbatches: PackedRows
    plan: StepPlan
    positions: TokenValues
    rewards: NDArray[np.float64]
    is_trained: NDArray[np.bool_]

    @property
    def minibatches(self) -> list[PackedRows]:
        """The microbatches of each optimizer step."""
        ends = np.cumsum([0, *self.plan.num_rows]).tolist()
        return [self.microbatches[begin:end] for begin, end in pairwise(ends)]

    @property
    def advantages(self) -> LossTokenValues:
        """Advantages of the loss tokens."""
        return self.microbatches.advantages

    @property
    def values(self) -> TokenValues | None:
        """With a critic, its value of each loss token."""
        return self.microbatches.old_values

    @property
    def returns(self) -> TokenValues | None:
        """With a critic, its target for each loss token."""
        return self.microbatches.returns

    def with_credit(self, credit: Credit, values: TokenValues | None = None) -> TrainBatch:
        """Return a copy with these advantages; with a critic also with its values and its returns."""
        rows = replace(self.microbatches, advantages=credit.advantages, old_values=values, returns=credit.returns)
        return replace(self, microbatches=rows)

    def with_log_probs(self, *, old: Sequence[Tensor | None] | None, ref: Sequence[Tensor] | None) -> TrainBatch:
        """Return a copy with log-probs: one [T] tensor per entry of `microbatches`; None (also an entry): unchanged."""
        return replace(self, microbatches=self.microbatches.with_log_probs(old=old, ref=ref))

    @property
    def mean_advantages(self) -> NDArray[np.float64]:
        """Mean advantage over its loss tokens of each rollout of this rank, ascending by rollout, [N]."""
        return mean_values(self.advantages)

    def completion_values(self, values: Sequence[Tensor]) -> TokenValues:
        """Return the values of the loss tokens of this rank's rollouts from one [T] tensor per microbatch."""
        return unpack(values, self.microbatches)


def build_batch(
    groups: SampledGroups,
    rewards: NDArray[np.float64],
    train: TrainConfig,
    objective: Objective,
    *,
    transfer: RolloutTransfer,
    shape: RowShape,
    cost: RolloutCost = RolloutCost(),  # noqa: B008 - frozen
) -> TrainBatch:
    """Build this rank's rows with their advantages and token weights. Collective: the tokens move to this rank.

    Args:
        groups: the rollouts of the step.
        rewards: [R], before the overlong penalty; NaN: the rollout could not be scored.
        train: number of minibatches and token budget of a row.
        objective: computes advantages and weights. Advantages that need log-probs are set later (`with_credit`).
        transfer: moves rollouts between ranks.
        shape: multiples that the layout requires of row and segment lengths.
        cost: operations of a rollout, by which ranks and rows are balanced.

    Raises:
        ValueError: a reward, a step value or an advantage is not finite.
        UserError: a rollout is longer than a row.
    """
    size, table = groups.group_size, groups.table
    spans = [
        range(span.start * size, span.stop * size)
        for span in split_minibatches(table.num_groups, train.minibatches_per_epoch)
    ]
    weights = objective.token_weights(groups, rewards, spans)
    topology = transfer.ranks.topology
    plan = plan_step(
        table.num_tokens,
        spans,
        max_tokens=train.max_tokens_per_microbatch,
        dp=topology.dp,
        shape=shape,
        cost=cost,
    )
    tokens = transfer.to_trainers(groups.tokens, table, plan.trainer)
    positions = TokenValues(tokens.ids, offsets_of(tokens.loss_counts), tokens.loss_positions)
    credit = objective.credit(groups, rewards, OwnTokens(positions, gather=transfer.collectives.gather_losses))
    rows = rows_of_plan(
        plan,
        transfer.ranks.at.dp_rank,
        tokens,
        credit.advantages,
        weights.weights,
        segment_multiple=shape.segment_multiple,
    )
    return TrainBatch(rows, plan, positions, rewards, weights.is_trained)


def kl_penalties(
    objective: Objective, batch: TrainBatch, transfer: RolloutTransfer
) -> tuple[TokenValues, NDArray[np.float64]]:
    """Return the penalty of each loss token of this rank, and the sum of each rollout of the step, [R]. Collective.

    The penalty is kl_coef times the KL divergence of the policy before the update from the reference.

    Args:
        objective: computes the divergence from the log-probs.
        batch: rows with both log-probs on the last pipeline stage.
        transfer: gives the other stages the penalties too, and adds over the ranks.
    """
    rows = [row for microbatch in batch.microbatches if (row := objective.kl(microbatch)) is not None]
    kl = transfer.in_replica(batch.completion_values(rows) if rows else None, batch.positions)
    penalties = kl.with_values(objective.algorithm.kl_coef * kl.values.astype(np.float64))
    return penalties, transfer.sum_per_rollout(sums_per_rollout(penalties), kl.ids, len(batch.rewards))


def rows_of_plan(
    plan: StepPlan,
    dp_rank: int,
    tokens: RolloutTokens,
    advantages: LossTokenValues,
    token_weights: NDArray[np.float64],
    *,
    segment_multiple: int,
) -> PackedRows:
    """Return the rows of a data-parallel rank, minibatch by minibatch.

    Args:
        plan: rows of all ranks.
        dp_rank: data-parallel rank of the rows.
        tokens: of exactly the rollouts of this rank.
        advantages: of their loss tokens.
        token_weights: [R] factor of the loss of each token of each rollout of the step.
        segment_multiple: every segment is padded to a multiple of it.
    """
    ids = [row for minibatch in plan.rows_of(dp_rank) for row in minibatch]
    return PackedRows(ids, tokens, advantages, token_weights, plan.row_tokens, segment_multiple)


def shuffled_rewards(rewards: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Return the rewards [R] in random order: a control run, which cannot learn the task from them.

    Rollouts without a reward (NaN) stay without.
    """
    known = ~np.isnan(rewards)
    values: list[Any] = rewards[known].tolist()
    random.Random(seed).shuffle(values)
    shuffled = rewards.copy()
    shuffled[known] = values
    return shuffled


def explain_batch(config: Config, topology: Topology) -> str:
    """Describe batch sizes and denominators of a step in text, for the start of a run."""
    prompts, group, train = config.data.prompts_per_step, config.sampling.group_size, config.train
    rollouts = prompts * group
    updates = train.epochs_per_rollout * train.minibatches_per_epoch
    spans = split_minibatches(prompts, train.minibatches_per_epoch)
    sizes = " or ".join(str(size) for size in sorted({len(span) * group for span in spans}))
    wave = config.sampling.prompts_per_wave or prompts
    return "\n".join(
        (
            f"a step: {prompts} prompts x {group} rollouts = {rollouts} rollouts, {-(-prompts // wave)} wave(s) over "
            f"{topology.num_replicas} engine replica(s) of {topology.engine_ranks} rank(s)",
            f"updates: {train.epochs_per_rollout} epoch(s) x {train.minibatches_per_epoch} minibatch(es) = {updates} "
            f"optimizer step(s) per step, {train.num_updates} in total",
            f"an update: {sizes} rollouts over {topology.dp} data-parallel rank(s), in rows "
            f"of at most {train.max_tokens_per_microbatch} tokens",
            f"its loss: {Objective(config.algorithm, config.sampling.max_tokens).describe(sizes)}, the same for every "
            "layout",
            f"learning rate: {LearningRateSchedule.of(config.optimizer, train).describe()}",
        )
    )

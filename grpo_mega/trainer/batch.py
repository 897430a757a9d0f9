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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grpo_mega.algorithm.base import OwnTokens
from grpo_mega.config.schema import Config, TrainConfig
from grpo_mega.data.pack import pack, token_rows, unpack
from grpo_mega.data.rollout_tokens import RolloutTokens, means_per_rollout, ragged_index, sums_per_rollout
from grpo_mega.data.row_plan import RolloutCost, RowShape, StepPlan, plan_step, split_minibatches
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.learning_rate import LearningRateSchedule
from grpo_mega.trainer.objective import Credit, Objective
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.types import Microbatch, TokenValues

_PAD_ID = 0  # any valid token id: positions of padding have no loss and attend to nothing


@dataclass(frozen=True)
class TrainBatch:
    """Rows of this rank for one step.

    Attributes:
        minibatches: `minibatches[i]` are the microbatches of one optimizer step.
        plan: rollouts of all rows of all ranks.
        positions: of the loss tokens of this rank's rollouts in their completions.
        advantages: of these tokens.
        rewards: [R] from which the advantages are computed, before the overlong penalty; NaN: not scored.
        is_trained: [R] False for rollouts without loss.
        values: with a critic, its value of each of these tokens.
        returns: with a critic, its target for each of these tokens.
    """

    minibatches: list[list[Microbatch]]
    plan: StepPlan
    positions: TokenValues
    advantages: TokenValues
    rewards: NDArray[np.float64]
    is_trained: NDArray[np.bool_]
    values: TokenValues | None = None
    returns: TokenValues | None = None

    def with_credit(self, credit: Credit, values: TokenValues | None = None) -> TrainBatch:
        """Return a copy with these advantages; with a critic also with its values and its returns."""
        rows = iter(zip(*(self._rows(each) for each in (credit.advantages, values, credit.returns)), strict=True))
        minibatches = []
        for minibatch in self.minibatches:
            part = []
            for microbatch in minibatch:
                advantages, old_values, returns = next(rows)
                assert advantages is not None
                part.append(replace(microbatch, advantages=advantages, old_values=old_values, returns=returns))
            minibatches.append(part)
        return replace(
            self, minibatches=minibatches, advantages=credit.advantages, values=values, returns=credit.returns
        )

    def _rows(self, values: TokenValues | None) -> Sequence[Tensor | None]:
        return [None] * len(self.microbatches) if values is None else token_rows(values, self.microbatches)

    def with_log_probs(self, *, old: Sequence[Tensor | None] | None, ref: Sequence[Tensor] | None) -> TrainBatch:
        """Return a copy with log-probs: one [T] tensor per entry of `microbatches`; None (also an entry): unchanged."""
        rows = iter(range(len(self.microbatches)))
        filled = []
        for minibatch in self.minibatches:
            part = []
            for microbatch in minibatch:
                i = next(rows)
                part.append(
                    replace(
                        microbatch,
                        old_log_probs=microbatch.old_log_probs if old is None or old[i] is None else old[i],
                        ref_log_probs=ref[i] if ref is not None else microbatch.ref_log_probs,
                    )
                )
            filled.append(part)
        return replace(self, minibatches=filled)

    @property
    def microbatches(self) -> list[Microbatch]:
        """All microbatches, minibatch by minibatch."""
        return [m for minibatch in self.minibatches for m in minibatch]

    @property
    def mean_advantages(self) -> NDArray[np.float64]:
        """Mean advantage over its loss tokens of each rollout of this rank, ascending by rollout, [N]."""
        return means_per_rollout(self.advantages)

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
    positions = TokenValues(tokens.ids, tokens.on_loss_tokens(tokens.loss_mask).offsets, tokens.loss_positions)
    credit = objective.credit(groups, rewards, OwnTokens(positions, gather=transfer.collectives.gather_losses))
    minibatches = pack_rows(
        plan,
        transfer.ranks.at.dp_rank,
        tokens,
        credit.advantages,
        weights.weights,
        segment_multiple=shape.segment_multiple,
    )
    return TrainBatch(minibatches, plan, positions, credit.advantages, rewards, weights.is_trained)


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


def pack_rows(
    plan: StepPlan,
    dp_rank: int,
    tokens: RolloutTokens,
    advantages: TokenValues,
    token_weights: NDArray[np.float64],
    *,
    segment_multiple: int,
) -> list[list[Microbatch]]:
    """Return the rows of a data-parallel rank, minibatch by minibatch.

    Args:
        plan: rows of all ranks.
        dp_rank: data-parallel rank of the rows.
        tokens: of exactly the rollouts of this rank.
        advantages: of their loss tokens.
        token_weights: [R] factor of the loss of each token of each rollout of the step.
        segment_multiple: every segment is padded to a multiple of it.
    """

    def row(ids: list[int]) -> Microbatch:
        places = np.searchsorted(tokens.ids, np.array(ids, dtype=np.int64))
        chosen = ragged_index(advantages.offsets[:-1][places], advantages.counts[places])
        return pack(
            tokens.select(places),
            row_tokens=plan.row_tokens,
            advantages=advantages.values[chosen],
            token_weights=token_weights[ids],
            pad_id=_PAD_ID,
            segment_multiple=segment_multiple,
        )

    return [[row(ids) for ids in ranks[dp_rank]] for ranks in plan.minibatches]


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

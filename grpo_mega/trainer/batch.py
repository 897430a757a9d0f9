"""Builds the microbatches of this rank from the rollouts of a step: advantages, token weights, packing.

Pure arithmetic on data that every rank has: all ranks compute the same plan, and each keeps its own rows. Minibatches
consist of whole groups, and each has its own denominators. All rows of a step have the same length on all ranks,
because pipeline stages exchange tensors of one shape.
Asserted by tests/unit/trainer/test_batch.py.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from grpo_mega.algorithm.base import Advantage
from grpo_mega.config.schema import Config, TrainConfig
from grpo_mega.data.pack import RowShape, pack, plan_update, split_minibatches, unpack
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.sampler import SampledGroups
from grpo_mega.trainer.learning_rate import LearningRateSchedule
from grpo_mega.trainer.objective import Objective
from grpo_mega.types import Microbatch, Reward, Rollout

_PAD_ID = 0  # any valid token id: positions of padding have no loss and attend to nothing


@dataclass(frozen=True)
class TrainBatch:
    """Rows of this rank for one step. The lists other than `minibatches` have one entry per rollout of the step.

    Attributes:
        minibatches: `minibatches[i]` are the microbatches of one optimizer step.
        advantages: of each rollout.
        rewards: from which the advantages were computed, before the overlong penalty; None: not scored.
        is_trained: False for rollouts without loss.
        values: with a critic, the value of each loss token; otherwise empty.
        returns: with a critic, the return of each loss token; otherwise empty.
    """

    minibatches: list[list[Microbatch]]
    advantages: list[Advantage]
    rewards: list[float | None] = field(default_factory=list)
    is_trained: list[bool] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    returns: list[list[float]] = field(default_factory=list)

    def with_advantages(self, advantages: Sequence[Advantage]) -> TrainBatch:
        """Return a copy with these advantages (one entry per rollout of the step)."""
        minibatches = [
            [replace(m, advantages=_on_tokens(m, advantages)) for m in minibatch] for minibatch in self.minibatches
        ]
        return replace(self, minibatches=minibatches, advantages=list(advantages))

    def with_values(self, values: Sequence[list[float]], returns: Sequence[list[float]]) -> TrainBatch:
        """Return a copy with the critic's values and returns, one number per loss token of each rollout."""
        minibatches = [
            [replace(m, old_values=_on_tokens(m, values), returns=_on_tokens(m, returns)) for m in minibatch]
            for minibatch in self.minibatches
        ]
        return replace(self, minibatches=minibatches, values=list(values), returns=list(returns))

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

    def of_minibatches(self, numbers: range) -> TrainBatch:
        """Return a copy that has only these minibatches; the lists per rollout stay complete."""
        return replace(self, minibatches=[self.minibatches[i] for i in numbers])

    @property
    def mean_advantages(self) -> list[float]:
        """Mean advantage of each rollout over its loss tokens."""
        return [statistics.fmean(a) if isinstance(a, list) else a for a in self.advantages]

    @property
    def microbatches(self) -> list[Microbatch]:
        """All microbatches, minibatch by minibatch."""
        return [m for minibatch in self.minibatches for m in minibatch]

    def completion_values(self, values: Sequence[Tensor]) -> dict[int, list[float]]:
        """Return {rollout id: values of its loss tokens} from one [T] tensor per microbatch."""
        found: dict[int, list[float]] = {}
        for row, microbatch in zip(values, self.microbatches, strict=True):
            found |= unpack(row, microbatch)
        return found


def build_batch(
    groups: SampledGroups,
    rewards: Sequence[float | None],
    train: TrainConfig,
    objective: Objective,
    *,
    dp: int,
    dp_rank: int,
    shape: RowShape,
) -> TrainBatch:
    """Build this rank's rows with their advantages and token weights.

    Args:
        groups: all rollouts of the step.
        rewards: one per rollout, before the overlong penalty; None: the rollout could not be scored.
        train: number of minibatches and token budget of a row.
        objective: computes advantages and weights. Advantages that need log-probs are set later (`with_advantages`).
        dp: number of data-parallel ranks.
        dp_rank: data-parallel rank of this rank.
        shape: multiples that the layout requires of row and segment lengths.

    Raises:
        ValueError: a reward, a step value or an advantage is not finite.
    """
    size = groups.group_size
    spans = [
        range(span.start * size, span.stop * size)
        for span in split_minibatches(len(groups.rollouts) // size, train.minibatches_per_epoch)
    ]
    credit = objective.credit(groups, rewards, minibatches=spans)
    minibatches = pack_minibatches(
        groups.rollouts,
        spans,
        credit.advantages,
        credit.token_weights,
        max_tokens=train.max_tokens_per_microbatch,
        dp=dp,
        dp_rank=dp_rank,
        shape=shape,
    )
    return TrainBatch(minibatches, credit.advantages, list(rewards), credit.is_trained)


def pack_minibatches(
    rollouts: Sequence[Rollout],
    minibatches: Sequence[range],
    advantages: Sequence[Advantage],
    token_weights: Sequence[float],
    *,
    max_tokens: int,
    dp: int,
    dp_rank: int,
    shape: RowShape,
) -> list[list[Microbatch]]:
    """Return this rank's rows of each minibatch. All rows of the step have the same length on all ranks.

    Args:
        rollouts: all rollouts of the step.
        minibatches: the rollouts of each update.
        advantages: one entry per rollout.
        token_weights: one number per rollout, for each of its loss tokens.
        max_tokens: capacity of a row, in tokens.
        dp: number of data-parallel ranks.
        dp_rank: data-parallel rank of this rank.
        shape: multiples that the layout requires of row and segment lengths.

    Raises:
        UserError: a rollout is longer than `max_tokens`.
    """
    lengths = [shape.padded(r.num_tokens) for r in rollouts]
    plans = [plan_update([lengths[i] for i in ids], dp, max_tokens, shape.microbatch_multiple) for ids in minibatches]
    rows = [
        [ids[i] for i in row] for ids, plan in zip(minibatches, plans, strict=True) for rank in plan for row in rank
    ]
    longest = max(sum(lengths[i] for i in row) for row in rows)
    row_tokens = -(-longest // shape.row_multiple) * shape.row_multiple
    return [
        [
            pack(
                [(ids[i], rollouts[ids[i]]) for i in row],
                row_tokens=row_tokens,
                advantages=[advantages[ids[i]] for i in row],
                token_weights=[token_weights[ids[i]] for i in row],
                pad_id=_PAD_ID,
                segment_multiple=shape.segment_multiple,
            )
            for row in plan[dp_rank]
        ]
        for ids, plan in zip(minibatches, plans, strict=True)
    ]


def _on_tokens(microbatch: Microbatch, per_rollout: Sequence[Advantage]) -> Tensor:
    """Return [T]: the numbers of each rollout on its loss tokens; 0 at all other positions."""
    values = torch.zeros_like(microbatch.advantages)
    bounds = microbatch.cu_seqlens.tolist()
    for rollout_id, begin, end in zip(microbatch.rollout_ids, bounds, bounds[1:], strict=False):
        positions = microbatch.loss_mask[begin:end].nonzero().squeeze(1) + begin
        values[positions] = torch.tensor(per_rollout[rollout_id], dtype=values.dtype, device=values.device)
    return values


def shuffled_rewards(rewards: Sequence[Reward], seed: int) -> list[float | None]:
    """Return the rewards in random order: a control run, which cannot learn the task from them.

    Rollouts without a reward stay without.
    """
    values = [r.value for r in rewards if r.value is not None]
    random.Random(seed).shuffle(values)
    shuffled = iter(values)
    return [None if r.value is None else next(shuffled) for r in rewards]


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

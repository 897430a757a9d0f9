"""Random groups of rollouts, and the loss and gradient that the package computes for them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from grpo_mega.algorithm.base import OwnTokens
from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.config.schema import TrainConfig
from grpo_mega.data.row_plan import RowShape
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.batch import TrainBatch, build_batch, kl_penalties
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.types import Completion, Microbatch, Prompt, Reward, Rollout
from tests.helpers.thread_ranks import on_ranks

LENGTHS = [3, 1, 20, 4, 2, 1, 9, 1, 7, 12, 5, 17]  # three groups; one-token rollouts, and one that is truncated

GROUP, MAX_TOKENS = 4, 20


REWARDS = [[1.0, 0.0, 0.25, 0.5], [0.1, 0.1, 0.1, 0.1], [0.0, 1.0, 1.0, -0.5]]  # a group of equal rewards


@dataclass(frozen=True)
class RolloutValues:
    """Float64 values per rollout; `log_probs` and `entropy` are leaf tensors, `values` are those of a critic."""

    log_probs: list[Tensor]
    old: list[Tensor]
    ref: list[Tensor]
    sampler: list[Tensor]
    values: list[Tensor]
    entropy: list[Tensor]

    def differ(self, i: int) -> Tensor:
        """Return the log ratio of rollout i."""
        return self.log_probs[i] - self.old[i]


def make_data(spread: float = 0.4) -> RolloutValues:
    torch.manual_seed(0)
    ref = [-3 * torch.rand(n, dtype=torch.float64) for n in LENGTHS]
    old = [r + 0.3 * torch.randn_like(r) for r in ref]
    log_probs = [(o + spread * torch.randn_like(o)).requires_grad_() for o in old]
    sampler = [o + 0.5 * torch.randn_like(o) for o in old]
    values = [torch.randn_like(o) for o in old]
    entropy = [torch.rand_like(o).requires_grad_() for o in old]
    return RolloutValues(log_probs, old, ref, sampler, values, entropy)


def make_groups() -> tuple[SampledGroups, list[float]]:
    rng = random.Random(1)
    rewards = [r for group in REWARDS for r in group]
    prompts = [Prompt(i, "", tuple(range(rng.randrange(1, 6))), "") for i in range(len(REWARDS))]
    rollouts = [
        Rollout(
            prompts[i // GROUP],
            Completion(tuple(range(n)), (-1.0,) * n, "length" if n == MAX_TOKENS else "eos", 0, ""),
            Reward(rewards[i]),
            replica=0,
        )
        for i, n in enumerate(LENGTHS)
    ]
    return SampledGroups.of(rollouts, GROUP), rewards


def as_padded_row(values: list[Tensor], microbatch: Microbatch) -> Tensor:
    """Return values per rollout as a row [T]; positions outside the loss mask get arbitrary numbers."""
    found = torch.full(microbatch.loss_mask.shape, math.nan, dtype=torch.float64)
    chosen = [values[i] for i in microbatch.rollout_ids]
    return found.masked_scatter(microbatch.loss_mask, torch.cat(chosen)) if chosen else found


def compute_update_loss(
    data: RolloutValues, algorithm: AlgorithmConfig, *, dp: int = 1, max_tokens: int = 10_000, row_multiple: int = 1
) -> tuple[Tensor, list[TrainBatch]]:
    """Return the loss of an update as the ranks compute it, summed over the rows of all ranks."""
    groups, rewards = make_groups()
    objective = Objective(algorithm, MAX_TOKENS)
    train = TrainConfig(steps=1, max_tokens_per_microbatch=max_tokens)
    shape = RowShape(row_multiple=row_multiple)

    def batch_of(transfer: RolloutTransfer) -> TrainBatch:
        held = groups.held_by(is_first=transfer.ranks.is_first)
        batch = build_batch(held, np.array(rewards), train, objective, transfer=transfer, shape=shape)
        own, totals, values = OwnTokens(batch.positions, gather=transfer.collectives.gather_losses), None, None
        if objective.kl_in_reward:
            known = batch.with_log_probs(
                old=[as_padded_row(data.old, m) for m in batch.microbatches],
                ref=[as_padded_row(data.ref, m) for m in batch.microbatches],
            )
            penalties, totals = kl_penalties(objective, known, transfer)
            own = replace(own, penalties=penalties)
        if objective.algorithm.needs_critic:
            values = batch.completion_values([as_padded_row(data.values, m) for m in batch.microbatches])
        if totals is None and values is None:
            return batch
        return batch.with_credit(objective.credit(groups, batch.rewards, replace(own, values=values), totals), values)

    loss_of = objective.loss()
    total = torch.zeros((), dtype=torch.float64)
    batches = on_ranks(Topology(dp), batch_of)
    for batch in batches:
        for microbatch in batch.microbatches:
            row = replace(
                microbatch,
                old_log_probs=as_padded_row(data.old, microbatch),
                ref_log_probs=as_padded_row(data.ref, microbatch),
                sampler_log_probs=as_padded_row(data.sampler, microbatch),
            )
            loss, _ = loss_of(as_padded_row(data.log_probs, row), as_padded_row(data.entropy, row), row)
            total = total + (loss * row.token_weights).sum()
    return total, batches


def gradient_of(loss: Tensor, data: RolloutValues) -> Tensor:
    return torch.cat(torch.autograd.grad(loss, data.log_probs, allow_unused=False))

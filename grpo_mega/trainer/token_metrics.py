"""Metrics of a step's tokens: each rank reduces the tokens that it has, and the results are combined on every rank.

Asserted by tests/unit/trainer/test_token_metrics.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grpo_mega.data.expert_records import has_record
from grpo_mega.data.rollout_tokens import RolloutTokens, offsets_of
from grpo_mega.rollout.sampled_groups import SampledGroups, StepCarry
from grpo_mega.trainer.batch import TrainBatch
from grpo_mega.trainer.mismatch import Differences, mismatch_metrics
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.trainer.text_metrics import repetition_sums, script_sums, text_metrics
from grpo_mega.types import TokenValues


def token_metrics(
    differences: Differences, groups: SampledGroups, batch: TrainBatch, transfer: RolloutTransfer
) -> dict[str, float]:
    """Return the metrics of tokens, equal on every rank. Collective.

    Args:
        differences: of policy and engine on the rollouts that this rank sampled.
        groups: the same rollouts, and the table of all.
        batch: with a critic, its values and returns on the rollouts that this rank trains.
        transfer: reduces over the ranks.
    """
    collectives, table = transfer.collectives, groups.table
    found = mismatch_metrics(collectives.gather(differences.sums()))
    texts = collectives.gather(np.stack([repetition_of(groups.tokens), scripts_of(groups)])).sum(axis=0)
    found |= text_metrics(texts[0], texts[1])
    if groups.carry is not None:
        found |= staleness_metrics(collectives.gather(staleness_of(groups.tokens, groups.carry)), groups.carry)
    if table.has_experts.any():
        recorded = collectives.gather(np.array([float(num_recorded(groups.tokens))])).sum()
        found["train/unreplayed_fraction"] = float(1.0 - recorded / table.loss_tokens.sum())
    if batch.values is not None and batch.returns is not None:
        found |= critic_metrics(batch.values, batch.returns, transfer)
    return found


def staleness_of(tokens: RolloutTokens, carry: StepCarry) -> NDArray[np.float64]:
    """Return sum and maximum of the ages of the loss tokens, the number of older ones, and of all: [K] with K = 4.

    The age is the number of updates between the weights that sampled the token and those of the step.
    """
    ages = carry.policy_version - tokens.policy_versions[tokens.loss_mask]
    return np.array([ages.sum(), ages.max(initial=0), np.count_nonzero(ages > 0), len(ages)], np.float64)


def staleness_metrics(parts: NDArray[np.float64], carry: StepCarry) -> dict[str, float]:
    """Return the metrics of carried rollouts from the `staleness_of` of all ranks, [ranks, K]."""
    count, waits = max(1.0, parts[:, 3].sum()), carry.waits
    of_buffer = (
        {}
        if waits is None
        else {
            "rollout/ready_groups": float(waits.num_ready),
            "rollout/policy_wait_seconds": waits.policy_seconds,
            "rollout/sampler_wait_seconds": waits.sampler_seconds,
        }
    )
    return of_buffer | {
        "rollout/staleness_mean": float(parts[:, 0].sum() / count),
        "rollout/staleness_max": float(parts[:, 1].max()),
        "rollout/carried_fraction": float(parts[:, 2].sum() / count),
        "rollout/dropped_groups": float(carry.num_dropped),
        "rollout/carried_groups": float(carry.num_groups),
        "rollout/carried_tokens": float(carry.num_tokens),
    }


def repetition_of(tokens: RolloutTokens) -> NDArray[np.float64]:
    """Return `repetition_sums` of the completions, [K] with K = 2."""
    return repetition_sums(tokens.of_completions(tokens.token_ids), offsets_of(tokens.completion_tokens))


def scripts_of(groups: SampledGroups) -> NDArray[np.float64]:
    """Return `script_sums` of the completions that this rank sampled, [K] with K = 2."""
    prompts = [groups.prompts[row // groups.group_size].text for row in groups.tokens.ids.tolist()]
    return script_sums(prompts, groups.texts)


def num_recorded(tokens: RolloutTokens) -> int:
    """Return the number of loss tokens whose predicting token, the one before, has a routing record."""
    if tokens.expert_choices is None:
        return 0
    return int(has_record(tokens.expert_choices)[np.flatnonzero(tokens.loss_mask) - 1].sum())


def critic_metrics(values: TokenValues, returns: TokenValues, transfer: RolloutTransfer) -> dict[str, float]:
    """Return explained_variance = 1 - var(return - value) / var(return) over the step's tokens, and the means.

    Args:
        values: of the critic, of the loss tokens of this rank.
        returns: its targets for the same tokens.
        transfer: reduces over the data-parallel ranks.
    """
    gather = transfer.collectives.gather_losses
    columns = np.stack([values.values, returns.values, returns.values - values.values]).astype(np.float64)
    count = gather(np.array([float(columns.shape[1])])).sum()
    means: NDArray[np.float64] = gather(columns.sum(axis=1)).sum(axis=0) / count
    squares = gather(((columns - means[:, None]) ** 2).sum(axis=1)).sum(axis=0)
    return {
        "critic/value_mean": float(means[0]),
        "critic/return_mean": float(means[1]),
        "critic/explained_variance": float(1.0 - squares[2] / squares[1]) if squares[1] else 0.0,
    }

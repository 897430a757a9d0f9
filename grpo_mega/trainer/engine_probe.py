"""Compares policy and engine with new samples in a step whose rollouts are almost all of older weights.

With sampling during training (`train.max_staleness`) a step may have no token of the weights that the policy holds: the
buffer was full before the weights were sent. Then the mismatch guard has nothing to compare, because a token of other
weights differs legitimately. In such a step the engine samples a few short answers with its present weights before the
update, and the policy, which still has the same weights, computes their log-probs. The answers are not trained.
Asserted by tests/unit/trainer/test_engine_probe.py and tests/e2e/test_asynchrony.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grpo_mega.config.schema import Config
from grpo_mega.data.pack import unpack
from grpo_mega.data.row_plan import RolloutCost, RowShape, plan_step
from grpo_mega.interfaces import Policy
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.rewards.inputs import ScoringRow
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.sampler import Generator, Sampler
from grpo_mega.trainer.batch import rows_of_plan
from grpo_mega.trainer.mismatch import ComparedTokens, Differences
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.types import Reward, SamplingRequest, TokenValues

LEAST_TOKENS = 256
"""Tokens of the present weights, of all ranks, with which a step needs no new samples."""
NUM_PROMPTS, MAX_TOKENS = 32, 16
"""New samples: one answer to each of the first prompts of the step, of at most so many tokens."""


class NoScores:
    """Scorer that gives every rollout a reward of 0 at once."""

    def __init__(self) -> None:
        self._keys: list[int] = []

    def submit_row(self, key: int, row: ScoringRow) -> None:
        """Take the rollout; `row` is not read."""
        self._keys.append(key)

    def collect(self) -> dict[int, Reward]:
        """Return the rewards of everything submitted since the last call."""
        keys, self._keys = self._keys, []
        return {key: Reward(0.0) for key in keys}


@dataclass(frozen=True)
class EngineProbe:
    """Sampler of the answers, and computation of their log-probs.

    Attributes:
        sampler: samples on all engines, without scores.
        config: sections sampling, train, run, parallel and precision.
        transfer: of this rank.
        cost: operations of a rollout, by which the work is balanced.
    """

    sampler: Sampler
    config: Config
    transfer: RolloutTransfer
    cost: RolloutCost

    @classmethod
    def of(
        cls, generator: Generator, config: Config, transfer: RolloutTransfer, cost: RolloutCost, timers: PhaseTimer
    ) -> EngineProbe:
        """Build the probe of this rank.

        Args:
            generator: engine of this rank.
            config: of the run.
            transfer: of this rank.
            cost: operations of a rollout.
            timers: timer of the phase `reward`.
        """
        scorer = NoScores() if transfer.ranks.at.engine_tp_rank == 0 else None
        return cls(Sampler(generator, scorer, transfer.collectives, timers, None), config, transfer, cost)

    def is_needed(self, groups: SampledGroups) -> bool:
        """Return True if fewer than LEAST_TOKENS loss tokens of the step are of the present weights. Collective."""
        if groups.carry is None:
            return False
        tokens = groups.tokens
        present = (tokens.policy_versions == groups.carry.policy_version) & tokens.loss_mask
        return bool(self.transfer.collectives.sum(np.array([float(present.sum())]))[0] < LEAST_TOKENS)

    def sample(self, groups: SampledGroups, step: int) -> SampledGroups:
        """Sample the answers. Sampling in the background must be paused. Collective.

        Args:
            groups: of the step, whose first prompts are used.
            step: its number, from which the seed is derived.

        Raises:
            SamplingFailedError: on every rank, if an engine failed on one.
        """
        sampling = self.config.sampling
        length = min(MAX_TOKENS, sampling.max_tokens)
        request = SamplingRequest(1, sampling.temperature, length, seed=0)
        prompts = groups.prompts[: max(NUM_PROMPTS, self.transfer.ranks.topology.num_prompt_shards)]
        return self.sampler.sample(prompts, request, ("probe", self.config.run.seed, step))

    def compare(self, policy: Policy, sampled: SampledGroups) -> ComparedTokens:
        """Compute the policy's log-probs of the answers. Collective.

        Args:
            policy: of this rank, on the device, with the weights that sampled.
            sampled: result of `sample`.

        Raises:
            UserError: an answer is longer than a row.
        """
        transfer, table = self.transfer, sampled.table
        shape = RowShape.of(self.config.parallel, self.config.precision)
        plan = plan_step(
            table.num_tokens,
            [range(len(table))],
            max_tokens=self.config.train.max_tokens_per_microbatch,
            dp=transfer.ranks.topology.dp,
            shape=shape,
            cost=self.cost,
        )
        tokens = transfer.to_trainers(sampled.tokens, table, plan.trainer)
        zeros = tokens.on_loss_tokens(np.zeros_like(tokens.sampler_log_probs))
        rows = rows_of_plan(
            plan,
            transfer.ranks.at.dp_rank,
            tokens,
            zeros,
            np.ones(len(table)),
            segment_multiple=shape.segment_multiple,
        )
        log_probs = policy.log_probs(rows)
        found: TokenValues | None = None if log_probs is None else unpack(log_probs, rows)
        old = transfer.to_samplers(found, table, plan.trainer)
        return ComparedTokens(Differences.of(sampled.tokens, old), table)

"""The rollouts of a step after sampling and scoring: a global table, and the columns and texts of this rank's part.

Asserted by tests/unit/rollout/test_sampled_groups.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from grpo_mega.algorithm.degenerate import degenerate_groups
from grpo_mega.data.rollout_table import RolloutTable, SumOverRanks, gather_table
from grpo_mega.data.rollout_tokens import RolloutTokens
from grpo_mega.rollout.carried_rollouts import CarriedRollouts
from grpo_mega.types import Prompt, Rollout


@dataclass(frozen=True)
class AsyncWaits:
    """Queue and waits of a step whose groups were sampled in the background; equal on every rank.

    Attributes:
        num_ready: complete and scored groups of all shards when the step took its groups.
        policy_seconds: time for which the policy waited for groups and pauses of sampling, the longest of all ranks.
        sampler_seconds: time for which a server had nothing to sample or was paused, the longest of all servers.
    """

    num_ready: int
    policy_seconds: float
    sampler_seconds: float


@dataclass(frozen=True)
class StepCarry:
    """Rollouts that a step carries into the next one, with partial rollouts or with sampling in the background.

    Attributes:
        rollouts: of this rank's prompt shard.
        policy_version: number of updates behind the weights of the step; tokens with a lower one are carried over.
        num_dropped: groups of all shards that were dropped at the start of the step because of their age.
        num_groups: groups of all shards that are carried into the next step.
        num_tokens: tokens of these groups, with those of environments.
        waits: with sampling in the background.
    """

    rollouts: CarriedRollouts
    policy_version: int
    num_dropped: int
    num_groups: int
    num_tokens: int
    waits: AsyncWaits | None = None


@dataclass(frozen=True)
class SampledGroups:
    """Rollouts of a step, group by group in the order of the prompts.

    Attributes:
        prompts: one per group, equal on every rank.
        table: scalars of all rollouts, equal on every rank.
        tokens: of the rollouts that this prompt shard sampled, on its first rank; of none on other ranks.
        texts: completions of the rollouts of `tokens`, in the same order.
        failures: failed reward terms of the rollouts of `tokens`, in the same order.
        num_discarded: more groups that were sampled but not used, because they are degenerate.
        carry: what is carried into the next step; None without partial rollouts.
    """

    prompts: Sequence[Prompt]
    table: RolloutTable
    tokens: RolloutTokens
    texts: Sequence[str]
    failures: Sequence[tuple[str, ...]]
    num_discarded: int = 0
    carry: StepCarry | None = None

    @classmethod
    def gather(
        cls,
        prompts: Sequence[Prompt],
        group_size: int,
        own: Mapping[int, Rollout],
        *,
        prompt_shard: int = 0,
        component_names: Sequence[str] = (),
        sum_over_ranks: SumOverRanks = lambda array: array,
    ) -> SampledGroups:
        """Build the groups of a step; the arguments are those of `gather_table`. Collective.

        The default of `sum_over_ranks` is for one rank.
        """
        table = gather_table(
            prompts,
            group_size,
            own,
            prompt_shard=prompt_shard,
            component_names=component_names,
            sum_over_ranks=sum_over_ranks,
        )
        rollouts = sorted(own.items())
        return cls(
            prompts,
            table,
            RolloutTokens.of(rollouts),
            [rollout.completion.text for _, rollout in rollouts],
            [rollout.reward.failures for _, rollout in rollouts],
        )

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], group_size: int) -> SampledGroups:
        """Build the groups of a step from rollouts that one rank has, all of them in order; not collective."""
        prompts = [rollout.prompt for rollout in rollouts[::group_size]]
        for row, rollout in enumerate(rollouts):
            assert rollout.prompt == prompts[row // group_size], f"rollout {row} has not the prompt of its group"
        names = dict.fromkeys(name for rollout in rollouts for name in rollout.reward.components)
        return cls.gather(prompts, group_size, dict(enumerate(rollouts)), component_names=tuple(names))

    def held_by(self, *, is_first: bool) -> SampledGroups:
        """Return the groups as if the first rank had sampled all: the other ranks have no tokens and texts."""
        if is_first:
            return self
        return replace(self, tokens=self.tokens.select(np.zeros(len(self.tokens), np.bool_)), texts=[], failures=[])

    @property
    def group_size(self) -> int:
        """Rollouts of each group."""
        return self.table.group_size

    @cached_property
    def degenerate(self) -> NDArray[np.bool_]:
        """True for each group whose rewards differ by no more than rounding (algorithm/degenerate.py), [P]."""
        table, steps = self.table, None
        if table.has_steps.any():
            steps = [table.steps_of(row)[1].tolist() for row in range(len(table))]
        return degenerate_groups(table.reward, table.group_size, steps)

    def replace_groups(self, places: Sequence[int], sampled: SampledGroups) -> SampledGroups:
        """Put the non-degenerate groups of `sampled` into `places`; count all replaced and unused as discarded."""
        usable = np.flatnonzero(~sampled.degenerate)[: len(places)]
        order = np.arange(len(self.prompts))
        order[list(places)[: len(usable)]] = len(self.prompts) + usable
        both = self._append(sampled)
        return replace(both._take_groups(order), num_discarded=self.num_discarded + len(sampled.prompts))

    def _append(self, other: SampledGroups) -> SampledGroups:
        moved = other.tokens.with_ids(other.tokens.ids + len(self.table))
        return SampledGroups(
            [*self.prompts, *other.prompts],
            self.table.append(other.table),
            RolloutTokens.concatenate([self.tokens, moved]),
            [*self.texts, *other.texts],
            [*self.failures, *other.failures],
        )

    def _take_groups(self, order: NDArray[np.int64]) -> SampledGroups:
        size = self.group_size
        group_of = np.full(len(self.prompts), -1)
        group_of[order] = np.arange(len(order))
        new_ids = group_of[self.tokens.ids // size] * size + self.tokens.ids % size
        kept = np.flatnonzero(group_of[self.tokens.ids // size] >= 0)
        kept = kept[np.argsort(new_ids[kept], kind="stable")]
        return SampledGroups(
            [self.prompts[group] for group in order.tolist()],
            self.table.take_groups(order),
            replace(self.tokens, ids=new_ids).select(kept),
            [self.texts[place] for place in kept.tolist()],
            [self.failures[place] for place in kept.tolist()],
        )

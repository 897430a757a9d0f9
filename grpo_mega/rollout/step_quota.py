"""Chooses the groups that a prompt shard gives to a step, and gathers the step from all shards.

Asserted by tests/unit/rollout/test_partial_sampler.py and tests/unit/rollout/test_rollout_buffer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.rollout.carried_rollouts import OpenGroup, PromptOf
from grpo_mega.rollout.open_rollout import OpenRollout
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.types import Rollout


class StepQuota:
    """Choice of the groups that a shard gives to a step: the first `quota` groups that are complete.

    A group that the step must use has a reserved place: other groups cannot fill the quota before it is complete.

    Args:
        groups: groups in progress, in the order in which they were begun.
        quota: number of groups that the shard gives to a step.
        must_end: returns True for a group that the step must use.
        is_complete: returns True for a group that can be used.
    """

    def __init__(
        self,
        groups: Sequence[OpenGroup],
        quota: int,
        must_end: Callable[[OpenGroup], bool],
        is_complete: Callable[[OpenGroup], bool] = lambda group: group.is_done,
    ) -> None:
        self._groups, self._quota, self._is_complete = groups, quota, is_complete
        self._reserved = set([group for group in groups if must_end(group)][:quota])
        self._used: dict[OpenGroup, None] = {}  # ordered
        self._num_reserved_open = len(self._reserved)

    @property
    def is_reached(self) -> bool:
        """True if the number of chosen groups has reached the quota."""
        return len(self._used) >= self._quota

    def take_done(self) -> list[OpenGroup]:
        """Choose complete groups in their order, up to the quota; return those that this call has added."""
        new = []
        for group in self._groups:
            if self.is_reached:
                break
            if group in self._used or not self._is_complete(group):
                continue
            is_reserved = group in self._reserved
            if is_reserved or self._quota - len(self._used) > self._num_reserved_open:
                self._used[group] = None
                self._num_reserved_open -= is_reserved
                new.append(group)
        return new

    def groups(self) -> list[OpenGroup]:
        """Return the chosen groups, in the order in which they were begun."""
        return [group for group in self._groups if group in self._used]

    def open_rollouts(self) -> list[OpenRollout]:
        """Return the rollouts that are not complete, in their order."""
        return [rollout for group in self._groups for rollout in group.rollouts if not rollout.is_done]


def positions_of_shards(quotas: NDArray[np.int64]) -> list[list[int]]:
    """Return the positions of each shard's groups in a step: one group of each shard in turn, until none is left.

    Args:
        quotas: [S] groups of each shard.
    """
    turns = [(turn, shard) for shard, quota in enumerate(quotas.tolist()) for turn in range(quota)]
    places = {each: position for position, each in enumerate(sorted(turns))}
    return [[places[turn, shard] for turn in range(quota)] for shard, quota in enumerate(quotas.tolist())]


def gather_step(
    used: Sequence[int],
    rollouts: Mapping[int, Rollout],
    quotas: NDArray[np.int64],
    group_size: int,
    *,
    collectives: ArrayCollectives,
    prompt_of: PromptOf,
    component_names: Sequence[str],
) -> SampledGroups:
    """Gather the groups of all shards into one step. Collective.

    Args:
        used: prompt numbers of this shard's groups, in their order; not read on ranks without rollouts.
        rollouts: this shard's rollouts, with the key number * group_size + member; empty on all ranks of the shard but
            the first.
        quotas: [S] groups of each shard.
        group_size: rollouts of each group.
        collectives: of this rank.
        prompt_of: returns the prompt with a number.
        component_names: names of all reward terms, in the order of the config.
    """
    at = collectives.ranks.at
    positions, numbers = positions_of_shards(quotas)[at.prompt_shard], np.zeros(int(quotas.sum()))
    own: dict[int, Rollout] = {}
    if at.engine_tp_rank == 0:
        numbers[positions] = used
    if rollouts:
        own = {
            position * group_size + member: rollouts[number * group_size + member]
            for position, number in zip(positions, used, strict=True)
            for member in range(group_size)
        }
    numbers = collectives.sum(numbers)
    return SampledGroups.gather(
        [prompt_of(int(number)) for number in numbers.tolist()],
        group_size,
        own,
        prompt_shard=at.prompt_shard,
        component_names=component_names,
        sum_over_ranks=collectives.sum,
    )

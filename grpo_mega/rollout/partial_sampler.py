"""Samples a step with partial rollouts: a prompt shard begins more groups than a step takes, and carries the rest over.

A shard gives its quota of groups to a step. It samples all of its open groups by slices (slices.py), and stops after
the slice that completes the quota. What is then open or surplus is carried into the next step, which begins
`oversubmit` times the quota of groups again, in all. The groups of a step are those that were complete first; those of
one slice count in the order in which they were begun. Therefore the groups and the carried rollouts of a step are a
function of (weights, run.seed, step, carried rollouts): no clock and no other shard has an influence on them, and a
step that is made again after a kill gives the same tokens.

At the start of a step, groups with a token that is more than `max_staleness` versions old are dropped, and their
prompts are sampled again before others. A step does not end before it has the groups that were begun again and would be
too old in the next one, as many as its quota (staleness.py).
Asserted by tests/unit/rollout/test_partial_sampler.py and tests/e2e/test_partial_rollouts.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from grpo_mega.config.rollout_sections import PartialConfig
from grpo_mega.config.schema import Config
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.rollout.answer_times import SamplingMeasurement
from grpo_mega.rollout.carried_rollouts import CarriedRollouts, OpenGroup, PromptOf, PromptShard
from grpo_mega.rollout.sampled_groups import SampledGroups, StepCarry
from grpo_mega.rollout.sampler import agreed_sampling, derived_seed
from grpo_mega.rollout.scoring import RolloutScoring
from grpo_mega.rollout.slices import SliceSampler
from grpo_mega.rollout.staleness import StalenessLimit
from grpo_mega.rollout.step_quota import StepQuota, gather_step
from grpo_mega.types import Completion, Prompt, SamplingRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartialSampler:
    """Sampler of this rank.

    Attributes:
        slices: samples on this rank's replica.
        scoring: scores complete groups.
        collectives: of this rank.
        timers: timer of the phase `reward`.
        config: sections sampling, train and data.
        prompt_of: returns the prompt of a number (carried_rollouts.py).
        policy_version: returns the number of updates behind the engine's weights.
        measurement: of the times of this rank's rollouts.
        component_names: names of all reward terms, in the order of the config.
        any_unfinished: returns True if its argument is True on any rank of the replica.
    """

    slices: SliceSampler
    scoring: RolloutScoring
    collectives: ArrayCollectives
    timers: PhaseTimer
    config: Config
    prompt_of: PromptOf
    policy_version: Callable[[], int]
    measurement: SamplingMeasurement
    component_names: Sequence[str] = ()
    any_unfinished: Callable[[bool], bool] = bool

    @property
    def settings(self) -> PartialConfig:
        """Section `sampling.partial`."""
        assert self.config.sampling.partial is not None, "built with sampling.partial"
        return self.config.sampling.partial

    @property
    def staleness(self) -> StalenessLimit:
        """Limit of the age of groups."""
        return StalenessLimit(self.settings.max_staleness, self.config.train.updates_per_step)

    @property
    def shards(self) -> list[PromptShard]:
        """All prompt shards."""
        count = self.collectives.ranks.topology.num_prompt_shards
        return [PromptShard(i, count, self.config.data.prompts_per_step) for i in range(count)]

    def begin(self, step: int, carried: object, request: SamplingRequest, seed_of: Sequence[object]) -> PartialStep:
        """Begin a step.

        Args:
            step: its number.
            carried: the `CarriedRollouts` of the step before; None: nothing was carried.
            request: group size, temperature and limits.
            seed_of: values from which, with prompt shard and slice, the seeds are derived.
        """
        if carried is None:
            carried = CarriedRollouts.after_step(step - 1, self.shards[self.collectives.ranks.at.prompt_shard])
        assert isinstance(carried, CarriedRollouts), f"carried rollouts of type {type(carried).__name__}"
        return PartialStep(self, carried, request, seed_of)


class PartialStep:
    """Sampling of one step. Its methods are collective.

    Args:
        owner: sampler of this rank.
        carried: what the step before has left; it is not changed.
        request: group size, temperature and limits.
        seed_of: values from which the seeds are derived.
    """

    def __init__(
        self, owner: PartialSampler, carried: CarriedRollouts, request: SamplingRequest, seed_of: Sequence[object]
    ) -> None:
        self._owner, self._request, self._seed_of = owner, request, tuple(seed_of)
        self._version, self._num_slices = owner.policy_version(), 0
        kept = drop_unfit(carried, request)
        fresh, self._num_dropped = owner.staleness.drop_old(kept, self._version)
        self._carried = replace(fresh, groups=tuple(group.copy() for group in fresh.groups))

    def first(self) -> SampledGroups:
        """Return the groups of the step."""
        return self._sample(np.array([shard.quota for shard in self._owner.shards], dtype=np.int64))

    def refill(self, groups: SampledGroups, places: Sequence[int]) -> SampledGroups | None:
        """Return groups that replace those at `places`: each shard gives as many as it gave there."""
        shards = groups.table.prompt_shard[np.asarray(places, dtype=np.int64) * groups.group_size]
        return self._sample(np.bincount(shards, minlength=len(self._owner.shards))) if len(places) else None

    def finish(self, groups: SampledGroups) -> SampledGroups:
        """Return the groups with what is carried into the next step."""
        carried, collectives = self._carried, self._owner.collectives
        own = np.array([self._num_dropped, len(carried.groups), carried.num_tokens], dtype=np.float64)
        if collectives.ranks.at.engine_tp_rank != 0:
            own[:] = 0
        dropped, num_groups, num_tokens = (int(n) for n in collectives.sum(own).tolist())
        return replace(groups, carry=StepCarry(carried, self._version, dropped, num_groups, num_tokens))

    def _sample(self, quotas: NDArray[np.int64]) -> SampledGroups:
        """Return one group per unit of the shards' quotas."""
        owner, own = self._owner, int(quotas[self._owner.collectives.ranks.at.prompt_shard])
        wanted = math.ceil(owner.settings.oversubmit * own)
        self._carried = self._carried.fill(wanted, self._request.group_size, owner.prompt_of)
        must_end = partial(owner.staleness.must_end, policy_version=self._version)
        chosen = StepQuota(self._carried.groups, own, must_end)
        sampled = agreed_sampling(lambda: self._sample_own(chosen), owner.collectives, owner.scoring)
        used = chosen.groups()
        taken = set(used)
        unused = tuple(group for group in self._carried.groups if group not in taken)
        self._carried = replace(self._carried, groups=unused)
        with owner.timers.phase("reward"):  # most groups were scored during sampling
            return self._gather(used, quotas, sampled)

    def _sample_own(self, chosen: StepQuota) -> dict[int, tuple[Prompt, Completion]]:
        """Sample until the quota is reached, and score its groups meanwhile; return (prompt, completion) by key."""
        owner, clock, size = self._owner, self._owner.measurement.times.clock, self._request.group_size
        start = clock()
        sampled: dict[int, tuple[Prompt, Completion]] = {}
        ends: list[float] = []
        while True:
            for group in chosen.take_done():
                for member, rollout in enumerate(group.rollouts):
                    key, completion = group.number * size + member, rollout.completion(owner.slices.text_of)
                    sampled[key] = (rollout.prompt, completion)
                    owner.scoring.submit(key, rollout.prompt, completion)
                    ends.append(clock())
            if not owner.any_unfinished(not chosen.is_reached):
                break
            self._sample_slice(chosen)
        owner.measurement.record(start, ends)
        return sampled

    def _sample_slice(self, chosen: StepQuota) -> None:
        open_rollouts = [] if chosen.is_reached else chosen.open_rollouts()
        seed = derived_seed(*self._seed_of, self._carried.shard.index, "slice", self._num_slices)
        request = replace(self._request, seed=seed, continues=self._num_slices > 0)
        self._owner.slices.sample(open_rollouts, request)
        self._num_slices += 1

    def _gather(
        self, used: Sequence[OpenGroup], quotas: NDArray[np.int64], sampled: dict[int, tuple[Prompt, Completion]]
    ) -> SampledGroups:
        owner = self._owner
        return gather_step(
            [group.number for group in used],
            owner.scoring.collect(sampled),
            quotas,
            self._request.group_size,
            collectives=owner.collectives,
            prompt_of=owner.prompt_of,
            component_names=owner.component_names,
        )


def numbered_prompts(prompts: PromptDataset, prompts_per_step: int, seed: int) -> PromptOf:
    """Return the function that returns the prompt of a number: its step and its place in the step.

    Args:
        prompts: training prompts.
        prompts_per_step: `data.prompts_per_step`.
        seed: `run.seed`.
    """
    batch = lru_cache(maxsize=64)(lambda step: prompts.batch(step, prompts_per_step, seed))

    def prompt_of(number: int) -> Prompt:
        step, place = divmod(number, prompts_per_step)
        return batch(step)[place]

    return prompt_of


def drop_unfit(carried: CarriedRollouts, request: SamplingRequest) -> CarriedRollouts:
    """Drop carried groups that do not fit a changed group size or limit of tokens; their prompts are sampled again."""
    kept = carried.drop(lambda group: not _fits(group, request), is_second=False)
    if len(kept.groups) < len(carried.groups):
        log.warning(
            "%d carried groups do not fit sampling.group_size=%d and sampling.max_tokens=%d, which were changed; "
            "their prompts are sampled again",
            len(carried.groups) - len(kept.groups),
            request.group_size,
            request.max_tokens,
        )
    return kept


def _fits(group: OpenGroup, request: SamplingRequest) -> bool:
    return len(group.rollouts) == request.group_size and all(
        rollout.is_done or rollout.num_tokens < request.max_tokens for rollout in group.rollouts
    )

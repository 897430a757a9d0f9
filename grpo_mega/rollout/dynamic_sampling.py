"""Samples the groups of a step; optionally replaces degenerate groups by groups of other prompts.

The prompts and seeds of a step are a function of (run.seed, step) and of the rewards, which every rank has. Therefore
all ranks make the same rounds, and a step that is sampled again after a restart gives the same groups.
Asserted by tests/unit/rollout/test_dynamic_sampling.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from grpo_mega.config.schema import Config
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.sampler import derived_seed
from grpo_mega.types import Prompt, SamplingRequest, UserError


class GroupSampler(Protocol):
    """Interface of `rollout.sampler.Sampler`."""

    def sample(self, prompts: Sequence[Prompt], request: SamplingRequest, seed_of: Sequence[object]) -> SampledGroups:
        """Sample a group for each prompt; collective, with the same table on every rank."""
        ...


class StepSampling(Protocol):
    """Sampling of one step; every method is collective."""

    def first(self) -> SampledGroups:
        """Return the groups of the step."""
        ...

    def refill(self, groups: SampledGroups, places: Sequence[int]) -> SampledGroups | None:
        """Return groups of other prompts, which may replace `groups` at `places`; None if there are no more."""
        ...

    def finish(self, groups: SampledGroups) -> SampledGroups:
        """Return the groups that the step trains on, with what the step leaves to the next one."""
        ...


class PartialSampling(Protocol):
    """Interface of `rollout.partial_sampler.PartialSampler`."""

    def begin(self, step: int, carried: object, request: SamplingRequest, seed_of: Sequence[object]) -> StepSampling:
        """Begin a step.

        Args:
            step: its number.
            carried: rollouts of the step before that are continued; None: there are none.
            request: group size, temperature and limits.
            seed_of: values from which the seeds are derived.
        """
        ...


@dataclass(frozen=True)
class GroupSource:
    """Source of the groups that a step trains on. `partial` is set with `sampling.partial`."""

    sampler: GroupSampler
    prompts: PromptDataset
    config: Config
    partial: PartialSampling | None = None

    def sample(
        self, step: int, prompts_step: int | None = None, attempt: int = 0, carried: object = None
    ) -> SampledGroups:
        """Return G scored rollouts of each prompt of the step. Collective.

        Args:
            step: its number.
            prompts_step: step whose prompts are used, after a rollback; None: `step`.
            attempt: number of returns to a checkpoint before this step; another attempt has other seeds.
            carried: with `sampling.partial`, what the step before has left (`LoopState.carried`).

        With `algorithm.degenerate=refill`, a group whose rewards are all equal is replaced by a group of another
        prompt. This ends when no group is degenerate, after `algorithm.refill_rounds` rounds, or when there are no more
        prompts. Groups that stay degenerate are dropped from the loss.

        Raises:
            UserError: with `algorithm.routing_replay`, the engine returned no routing record for a rollout.

        Source: dynamic sampling: DAPO, arXiv:2503.14476, section "The More the Merrier: Dynamic Sampling". Differs: a
            round samples one prompt per degenerate group, the number of rounds is limited, and a prompt that replaced
            another one is still used at its own step (with `sampling.partial` it is used once).
        """
        sampling, seed = self.config.sampling, self.config.run.seed
        request = SamplingRequest(
            sampling.group_size,
            sampling.temperature,
            sampling.max_tokens,
            seed=0,
            expert_choices=self.config.algorithm.routing_replay,
        )
        seed_of = sampling_seed(seed, step, attempt)
        sampling_of_step: StepSampling
        if self.partial is not None:
            sampling_of_step = self.partial.begin(step, carried, request, seed_of)
        else:
            chosen = self.prompts.batch((prompts_step or step) - 1, self.config.data.prompts_per_step, seed)
            others = self._others(chosen, (seed, step) if attempt == 0 else (seed, step, "attempt", attempt))
            sampling_of_step = _WholeRollouts(self.sampler, chosen, others, request, seed_of)
        groups = self._require_routing_records(sampling_of_step.first())
        for _ in range(self.config.algorithm.refill_rounds or 0):  # set exactly under degenerate=refill
            sampled = sampling_of_step.refill(groups, places := np.flatnonzero(groups.degenerate).tolist())
            if sampled is None:
                break
            groups = groups.replace_groups(places, self._require_routing_records(sampled))
        return sampling_of_step.finish(groups)

    def _require_routing_records(self, groups: SampledGroups) -> SampledGroups:
        missing = np.flatnonzero(~groups.table.has_experts)
        if self.config.algorithm.routing_replay and len(missing):
            raise UserError(
                f"algorithm.routing_replay=true: engine.kind={self.config.engine.kind} returned no routing record for "
                f"{len(missing)} of {len(groups.table)} rollouts, the first of prompt "
                f"{groups.table.prompt_index[missing[0]]}",
                remedy="use an engine that returns routing records, or set algorithm.routing_replay=false",
            )
        return groups

    def _others(self, chosen: Sequence[Prompt], seed_of: Sequence[object]) -> Iterator[Prompt]:
        """Return all other prompts, shuffled for this step."""
        taken = {prompt.index for prompt in chosen}
        shuffled = self.prompts.shuffled(derived_seed("refill", *seed_of))
        return (prompt for prompt in shuffled if prompt.index not in taken)


@dataclass
class _WholeRollouts:
    """Sampling of a step whose rollouts are all complete at its end."""

    sampler: GroupSampler
    chosen: Sequence[Prompt]
    others: Iterator[Prompt]
    request: SamplingRequest
    seed_of: tuple[object, ...]
    num_refills: int = 0

    def first(self) -> SampledGroups:
        return self.sampler.sample(self.chosen, self.request, self.seed_of)

    def refill(self, groups: SampledGroups, places: Sequence[int]) -> SampledGroups | None:
        spare = list(islice(self.others, len(places)))
        if not spare:
            return None
        self.num_refills += 1
        return self.sampler.sample(spare, self.request, (*self.seed_of, "refill", self.num_refills - 1))

    def finish(self, groups: SampledGroups) -> SampledGroups:
        return groups


def sampling_seed(seed: int, step: int, attempt: int) -> tuple[object, ...]:
    """Return the values from which the seeds of a step's rollouts are derived; `seed` is run.seed."""
    return ("train", seed, step) if attempt == 0 else ("train", seed, step, "attempt", attempt)

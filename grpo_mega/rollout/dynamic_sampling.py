"""Samples the groups of a step; optionally replaces degenerate groups by groups of other prompts.

The prompts and seeds of a step are a function of (run.seed, step) and of the rewards, which every rank has. Therefore
all ranks make the same rounds, and a step that is sampled again after a restart gives the same groups.
Asserted by tests/unit/rollout/test_dynamic_sampling.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from grpo_mega.config.schema import Config
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.rollout.sampler import SampledGroups, derived_seed
from grpo_mega.types import Prompt, SamplingRequest, UserError


class GroupSampler(Protocol):
    """Interface of `rollout.sampler.Sampler`."""

    def sample(self, prompts: Sequence[Prompt], request: SamplingRequest, seed_of: Sequence[object]) -> SampledGroups:
        """Sample a group for each prompt; collective, with the same result on every rank."""
        ...


@dataclass(frozen=True)
class GroupSource:
    """Source of the groups that a step trains on."""

    sampler: GroupSampler
    prompts: PromptDataset
    config: Config

    def sample(self, step: int) -> SampledGroups:
        """Return G scored rollouts of each prompt of the step. Collective.

        With `algorithm.degenerate=refill`, a group whose rewards are all equal is replaced by a group of another
        prompt. This ends when no group is degenerate, after `algorithm.refill_rounds` rounds, or when there are no more
        prompts. Groups that stay degenerate are dropped from the loss.

        Raises:
            UserError: with `algorithm.routing_replay`, the engine returned no routing record for a rollout.

        Source: dynamic sampling: DAPO, arXiv:2503.14476, section "The More the Merrier: Dynamic Sampling". Differs: a
            round samples one prompt per degenerate group, the number of rounds is limited, and a prompt that replaced
            another one is still used at its own step.
        """
        sampling, seed = self.config.sampling, self.config.run.seed
        request = SamplingRequest(
            sampling.group_size,
            sampling.temperature,
            sampling.max_tokens,
            seed=0,
            expert_choices=self.config.algorithm.routing_replay,
        )
        chosen = self.prompts.batch(step - 1, self.config.data.prompts_per_step, seed)
        groups = self._require_routing_records(self.sampler.sample(chosen, request, ("train", seed, step)))
        rounds = self.config.algorithm.refill_rounds
        if rounds is None:  # config/algorithm_rules.py: set exactly under degenerate=refill
            return groups
        others = self._others(chosen, step)
        for refill in range(rounds):
            places = [p for p in range(len(chosen)) if groups.is_degenerate(p)]
            spare = list(islice(others, len(places)))
            if not spare:
                break
            sampled = self._require_routing_records(
                self.sampler.sample(spare, request, ("train", seed, step, "refill", refill))
            )
            groups = _replace_groups(groups, places, sampled)
        return groups

    def _require_routing_records(self, groups: SampledGroups) -> SampledGroups:
        missing = [r for r in groups.rollouts if r.completion.expert_choices is None]
        if self.config.algorithm.routing_replay and missing:
            raise UserError(
                f"algorithm.routing_replay=true: engine.kind={self.config.engine.kind} returned no routing record for "
                f"{len(missing)} of {len(groups.rollouts)} rollouts, the first of prompt {missing[0].prompt.index}",
                remedy="use an engine that returns routing records, or set algorithm.routing_replay=false",
            )
        return groups

    def _others(self, chosen: Sequence[Prompt], step: int) -> Iterator[Prompt]:
        """Return all other prompts, shuffled for this step."""
        taken = {prompt.index for prompt in chosen}
        shuffled = self.prompts.shuffled(derived_seed("refill", self.config.run.seed, step))
        return (prompt for prompt in shuffled if prompt.index not in taken)


def _replace_groups(groups: SampledGroups, places: Sequence[int], sampled: SampledGroups) -> SampledGroups:
    """Put the non-degenerate groups of `sampled` into `places`; count all replaced and unused groups as discarded."""
    size = groups.group_size
    rollouts = list(groups.rollouts)
    num_sampled = len(sampled.rollouts) // size
    usable = [i for i in range(num_sampled) if not sampled.is_degenerate(i)]
    for place, i in zip(places, usable, strict=False):
        rollouts[place * size : (place + 1) * size] = sampled.rollouts[i * size : (i + 1) * size]
    return replace(groups, rollouts=rollouts, num_discarded=groups.num_discarded + num_sampled)

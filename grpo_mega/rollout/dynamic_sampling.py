"""The groups of a step: sampled once, or again with other prompts in place of those that teach nothing.

Which prompts and seeds a step uses is a function of (run.seed, step) and of the rewards, which every rank has: all
ranks take the same rounds, and a step that is sampled again after a kill is the same.
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
    """The engines (rollout.Sampler)."""

    def sample(self, prompts: Sequence[Prompt], request: SamplingRequest, seed_of: Sequence[object]) -> SampledGroups:
        """Collective: a group for each prompt, the same on every rank."""
        ...


@dataclass(frozen=True)
class GroupSource:
    """What a step trains on."""

    sampler: GroupSampler
    prompts: PromptDataset
    config: Config

    def sample(self, step: int) -> SampledGroups:
        """Collective: G scored rollouts of each of the step's prompts.

        Under `algorithm.degenerate=refill` a group whose rewards are all equal gives its place to one of another
        prompt, until all places are taken by groups that teach, `algorithm.refill_rounds` rounds are over or the
        prompts are. Places that stay degenerate are dropped from the loss.

        Raises:
            UserError: under `algorithm.routing_replay` the engine did not tell a rollout's experts.

        Source: dynamic sampling: DAPO, arXiv:2503.14476, section "The More the Merrier: Dynamic Sampling". Differs: a
            round samples as many prompts as places are open, the rounds are limited, and a prompt that fills a place
            comes again when it is its turn.
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
        groups = self._told(self.sampler.sample(chosen, request, ("train", seed, step)))
        rounds = self.config.algorithm.refill_rounds
        if rounds is None:  # config/algorithm_rules.py: set exactly under degenerate=refill
            return groups
        others = self._others(chosen, step)
        for refill in range(rounds):
            places = [p for p in range(len(chosen)) if groups.is_degenerate(p)]
            spare = list(islice(others, len(places)))
            if not spare:
                break
            sampled = self._told(self.sampler.sample(spare, request, ("train", seed, step, "refill", refill)))
            groups = _filled(groups, places, sampled)
        return groups

    def _told(self, groups: SampledGroups) -> SampledGroups:
        silent = [r for r in groups.rollouts if r.completion.expert_choices is None]
        if self.config.algorithm.routing_replay and silent:
            raise UserError(
                f"algorithm.routing_replay=true: engine.kind={self.config.engine.kind} told no experts for "
                f"{len(silent)} of {len(groups.rollouts)} rollouts, the first of prompt {silent[0].prompt.index}",
                remedy="use an engine that does, or set algorithm.routing_replay=false",
            )
        return groups

    def _others(self, chosen: Sequence[Prompt], step: int) -> Iterator[Prompt]:
        """All other prompts, shuffled for this step."""
        taken = {prompt.index for prompt in chosen}
        shuffled = self.prompts.shuffled(derived_seed("refill", self.config.run.seed, step))
        return (prompt for prompt in shuffled if prompt.index not in taken)


def _filled(groups: SampledGroups, places: Sequence[int], sampled: SampledGroups) -> SampledGroups:
    """The groups of `sampled` that teach, put into `places`; the rest is discarded, like what was there."""
    size = groups.group_size
    rollouts = list(groups.rollouts)
    num_sampled = len(sampled.rollouts) // size
    teaching = [i for i in range(num_sampled) if not sampled.is_degenerate(i)]
    for place, i in zip(places, teaching, strict=False):
        rollouts[place * size : (place + 1) * size] = sampled.rollouts[i * size : (i + 1) * size]
    return replace(groups, rollouts=rollouts, num_discarded=groups.num_discarded + num_sampled)

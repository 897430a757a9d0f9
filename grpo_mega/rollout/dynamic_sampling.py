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


@dataclass(frozen=True)
class GroupSource:
    """Source of the groups that a step trains on."""

    sampler: GroupSampler
    prompts: PromptDataset
    config: Config

    def sample(self, step: int, prompts_step: int | None = None, attempt: int = 0) -> SampledGroups:
        """Return G scored rollouts of each prompt of the step. Collective.

        After a rollback, `prompts_step` is the step whose prompts are used, and `attempt` counts the returns to a
        checkpoint before this step: another attempt has other seeds.

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
        seed_of = sampling_seed(seed, step, attempt)
        chosen = self.prompts.batch((prompts_step or step) - 1, self.config.data.prompts_per_step, seed)
        groups = self._require_routing_records(self.sampler.sample(chosen, request, seed_of))
        rounds = self.config.algorithm.refill_rounds
        if rounds is None:  # config/algorithm_rules.py: set exactly under degenerate=refill
            return groups
        others = self._others(chosen, (seed, step) if attempt == 0 else (seed, step, "attempt", attempt))
        for refill in range(rounds):
            places = np.flatnonzero(groups.degenerate).tolist()
            spare = list(islice(others, len(places)))
            if not spare:
                break
            sampled = self._require_routing_records(self.sampler.sample(spare, request, (*seed_of, "refill", refill)))
            groups = groups.replace_groups(places, sampled)
        return groups

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


def sampling_seed(seed: int, step: int, attempt: int) -> tuple[object, ...]:
    """Return the values from which the seeds of a step's rollouts are derived; `seed` is run.seed."""
    return ("train", seed, step) if attempt == 0 else ("train", seed, step, "attempt", attempt)

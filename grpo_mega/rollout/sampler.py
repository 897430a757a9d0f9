"""Samples the answers of one step on all engine replicas, has them scored meanwhile, and shares the result.

Prompts are cut into waves; a wave's prompts are dealt in turn to the shares (parallel/topology.py): a replica, or each
of its data-parallel ranks, which call their engine together whatever they were dealt. Every rank of a share drives its
engine with the same requests; the first of them submits finished completions to the reward processes, which never
steers the engine. Afterwards every rank has all rollouts in the same order.
Asserted by tests/e2e/test_quickstart.py (tokens per replica add up) and tests/engine/test_vllm_engine.py.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch.distributed as dist

from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.types import Completion, Prompt, Reward, Rollout, SamplingRequest


class Generator(Protocol):
    """What samples whole rollouts: an engine, or an engine and an environment that take turns (turns.py)."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """As `Engine.generate`."""
        ...


class Scorer(Protocol):
    """Reward processes (rewards/pool.py)."""

    def submit(self, key: int, prompt: str, completion: str, reference: str) -> None:
        """Start scoring; returns at once."""
        ...

    def collect(self) -> dict[int, Reward]:
        """The rewards of everything submitted since the last call."""
        ...


@dataclass(frozen=True)
class SampledGroups:
    """Rollouts of a step, the groups one after the other in the prompts' order; the same on every rank.

    `num_discarded` groups were sampled besides, and are degenerate.
    """

    rollouts: list[Rollout]
    group_size: int
    num_discarded: int = 0

    def is_degenerate(self, group: int) -> bool:
        """Whether all rewards of a group, or of its steps, are equal."""
        first = group * self.group_size
        rollouts = self.rollouts[first : first + self.group_size]
        values = {value for r in rollouts for _, value in r.steps or ((0, r.reward.value),)}
        return len(values) == 1

    def tokens_per_replica(self, num_replicas: int) -> list[int]:
        """Completion tokens that each replica sampled."""
        totals = [0] * num_replicas
        for rollout in self.rollouts:
            totals[rollout.replica] += len(rollout.completion.token_ids)
        return totals


class StepEnds(Protocol):
    """Where tokens end in the text that they spell (data/chat.py)."""

    def __call__(self, token_ids: Sequence[int]) -> list[int]:
        """Per token, the number of characters up to and with it."""
        ...


def locate_step_tokens(
    reward: Reward, completion: Completion, ends_of: StepEnds
) -> tuple[tuple[int, float], ...] | None:
    """A reward's steps with the tokens in which they end: those that hold the steps' last characters.

    A step that ends with the text ends with the completion, EOS included.
    """
    if reward.steps is None:
        return None
    ends, last = ends_of(completion.token_ids), len(completion.token_ids) - 1
    return tuple(
        (last if end >= len(completion.text) - 1 else min(bisect_right(ends, end), last), value)
        for end, value in reward.steps
    )


class Sampler:
    """The engine replicas of a job and their reward processes, as one. `scorer` is None on ranks that do not score;
    `floor` is the reward of a rollout whose environment failed, `ends_of` finds the tokens of a process reward's
    steps."""

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer | None,
        ranks: Ranks,
        timers: PhaseTimer,
        prompts_per_wave: int | None,
        floor: Reward | None = None,
        ends_of: StepEnds | None = None,
    ) -> None:
        self._generator, self._scorer, self._ranks, self._timers = generator, scorer, ranks, timers
        self._prompts_per_wave, self._floor, self._ends_of = prompts_per_wave, floor, ends_of

    def sample(self, prompts: Sequence[Prompt], request: SamplingRequest, seed_of: Sequence[object]) -> SampledGroups:
        """Collective. `request.seed` is replaced: each wave and share draws from its own, made of `seed_of`."""
        group_size, at = request.group_size, self._ranks.at
        mine: dict[int, tuple[Completion, int]] = {}
        wave_size = self._prompts_per_wave or max(1, len(prompts))
        for wave, start in enumerate(range(0, len(prompts), wave_size)):
            positions = range(start, min(start + wave_size, len(prompts)))[at.share :: self._ranks.topology.num_shares]
            chosen = [prompts[p] for p in positions]

            def submit(
                local: int,
                member: int,
                completion: Completion,
                positions: range = positions,
                chosen: list[Prompt] = chosen,
            ) -> None:
                key = positions[local] * group_size + member
                mine[key] = (completion, at.replica)
                if self._scorer is not None and completion.failure is None:
                    self._scorer.submit(key, chosen[local].text, completion.text, chosen[local].answer)

            seed = derived_seed(*seed_of, wave, at.share)
            self._generator.generate(chosen, replace(request, seed=seed), submit)
        with self._timers.phase("reward"):  # what is left of it: most was scored during the sampling
            return SampledGroups(self._gather_rollouts(prompts, group_size, mine), group_size)

    def _gather_rollouts(
        self, prompts: Sequence[Prompt], group_size: int, mine: dict[int, tuple[Completion, int]]
    ) -> list[Rollout]:
        """Score what is left, then exchange: the first rank of each share speaks for it."""
        spoken = None
        if self._scorer is not None:
            rewards = self._scorer.collect()
            failed = {key: self._floor for key, (completion, _) in mine.items() if completion.failure is not None}
            rewards |= {key: floor for key, floor in failed.items() if floor is not None}
            spoken = {key: (completion, rewards[key], replica) for key, (completion, replica) in mine.items()}
        heard: list[dict[int, tuple[Completion, Reward, int]] | None] = [spoken]
        if self._ranks.topology.world_size > 1:
            heard = [None] * self._ranks.topology.world_size
            dist.all_gather_object(heard, spoken)
        by_key = {key: value for part in heard if part is not None for key, value in part.items()}
        expected = len(prompts) * group_size
        if len(by_key) != expected:
            raise RuntimeError(f"the engines returned {len(by_key)} rollouts of {expected}")
        return [self._rollout(prompts[key // group_size], *by_key[key]) for key in range(expected)]

    def _rollout(self, prompt: Prompt, completion: Completion, reward: Reward, replica: int) -> Rollout:
        steps = locate_step_tokens(reward, completion, self._ends_of) if self._ends_of is not None else None
        return Rollout(prompt, completion, reward, replica, steps)


def derived_seed(*parts: object) -> int:
    """A 31-bit seed from (run.seed, purpose, step, wave, share): the same in every run and process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1

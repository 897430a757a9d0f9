"""Samples the rollouts of a step on all engine replicas and scores them meanwhile.

Prompts are divided into waves. The prompts of a wave are distributed round-robin over the prompt shards
(parallel/topology.py): a shard is a replica, or one of its data-parallel ranks. Data-parallel ranks of a replica call
their engine together, also with an empty shard. Every rank of a shard sends the same requests to its engine. The first
rank of a shard submits finished completions to the reward workers, and no result of a worker changes what the engine
does. At the end every rank has all rollouts in the same order.
Asserted by tests/e2e/test_quickstart.py (tokens per replica add up) and tests/engine/test_vllm_engine.py.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from grpo_mega.observe.log import FILE_ONLY
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.scoring import RolloutScoring, Scorer, StepEnds
from grpo_mega.types import Completion, Prompt, Reward, SamplingRequest

log = logging.getLogger(__name__)
T = TypeVar("T")


class Generator(Protocol):
    """Sampler of whole rollouts: an engine, or an engine with an environment (rollout/multi_turn.py)."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample; the contract is `Engine.generate`."""
        ...


class SamplingFailedError(RuntimeError):
    """The engine of a rank failed, or returned what cannot be right. Raised on every rank; no rollout was used."""


def agreed_sampling(sample: Callable[[], T], collectives: ArrayCollectives, scoring: RolloutScoring) -> T:
    """Return what `sample` returns, if it fails on no rank. Collective.

    Args:
        sample: calls the engine of this rank.
        collectives: of this rank.
        scoring: discards the scores of rollouts that are sampled again.

    Raises:
        SamplingFailedError: on every rank, if an engine failed on one.
        ValueError: the request is wrong, on every rank.
    """
    failure, found = None, None
    try:
        found = sample()
    except ValueError:  # of the request, on every rank
        raise
    except Exception as error:  # engines raise anything
        failure = f"{type(error).__name__}: {error}"
        log.warning("sampling failed on this rank", exc_info=error, extra=FILE_ONLY)
    mine = np.zeros(collectives.world_size)
    mine[collectives.ranks.rank] = failure is not None
    failed = np.flatnonzero(collectives.sum(mine)).tolist()
    if failed:
        scoring.discard()
        where = f"rank {', '.join(map(str, failed))}"
        raise SamplingFailedError(f"sampling failed on {where}: {failure or 'the log of that rank has the reason'}")
    assert found is not None, "sampling did not fail"
    return found


class Sampler:
    """Sampler over all engine replicas and reward workers of a job."""

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer | None,
        collectives: ArrayCollectives,
        timers: PhaseTimer,
        prompts_per_wave: int | None,
        component_names: Sequence[str] = (),
        floor_of: Callable[[str], Reward] | None = None,
        ends_of: StepEnds | None = None,
        special_text_of: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        """Create the sampler of this rank.

        Args:
            generator: samples whole rollouts on this rank's replica.
            scorer: reward workers; None on ranks that do not score.
            collectives: of this rank; they also give its coordinates.
            timers: timer of the phase `reward`.
            prompts_per_wave: prompts that enter the engines together; None: all.
            component_names: names of all reward terms, in the order of the config.
            floor_of: returns the reward of a rollout whose environment failed, by the name of the data set.
            ends_of: finds the end tokens of a process reward's steps; None: steps are ignored.
            special_text_of: returns the text of tokens with special tokens; None: no reward reads it.
        """
        self._generator, self._timers = generator, timers
        self.collectives, self._ranks, self.component_names = collectives, collectives.ranks, tuple(component_names)
        self._prompts_per_wave = prompts_per_wave
        self.scoring = RolloutScoring(scorer, collectives.ranks.at.replica, floor_of, ends_of, special_text_of)

    def sample(self, prompts: Sequence[Prompt], request: SamplingRequest, seed_of: Sequence[object]) -> SampledGroups:
        """Sample and score one group per prompt. Collective.

        Args:
            prompts: all prompts of the step, the same on every rank.
            request: group size, temperature and limits; its seed is replaced.
            seed_of: values from which, with wave and prompt shard, the seed is derived (`derived_seed`).

        Raises:
            SamplingFailedError: on every rank, if an engine failed on one.
            RuntimeError: the engines did not return one rollout per request.
        """
        mine = agreed_sampling(lambda: self._sample_own(prompts, request, seed_of), self.collectives, self.scoring)
        with self._timers.phase("reward"):  # most completions were scored during sampling
            return SampledGroups.gather(
                prompts,
                request.group_size,
                self.scoring.collect(mine),
                prompt_shard=self._ranks.at.prompt_shard,
                component_names=self.component_names,
                sum_over_ranks=self.collectives.sum,
            )

    def _sample_own(
        self, prompts: Sequence[Prompt], request: SamplingRequest, seed_of: Sequence[object]
    ) -> dict[int, tuple[Prompt, Completion]]:
        """Sample the prompts of this shard, and start their scoring. Return (prompt, completion) by row of the step."""
        group_size, at = request.group_size, self._ranks.at
        mine: dict[int, tuple[Prompt, Completion]] = {}
        wave_size = self._prompts_per_wave or max(1, len(prompts))
        for wave, start in enumerate(range(0, len(prompts), wave_size)):
            positions = range(start, min(start + wave_size, len(prompts)))[
                at.prompt_shard :: self._ranks.topology.num_prompt_shards
            ]
            chosen = [prompts[p] for p in positions]

            def submit(
                local: int,
                member: int,
                completion: Completion,
                positions: range = positions,
                chosen: list[Prompt] = chosen,
            ) -> None:
                key = positions[local] * group_size + member
                mine[key] = (chosen[local], completion)
                self.scoring.submit(key, chosen[local], completion)

            seed = derived_seed(*seed_of, wave, at.prompt_shard)
            self._generator.generate(chosen, replace(request, seed=seed), submit)
        return mine


def derived_seed(*parts: object) -> int:
    """Return a 31-bit seed that is a function of the parts, equal in every run and process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1

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
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from grpo_mega.observe.log import FILE_ONLY
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.rewards.inputs import ScoringRow
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.types import Completion, Prompt, Reward, Rollout, SamplingRequest

log = logging.getLogger(__name__)


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


class Scorer(Protocol):
    """Interface of the reward workers (rewards/pool.py)."""

    def submit_row(self, key: int, row: ScoringRow) -> None:
        """Start scoring; returns at once.

        Args:
            key: number of the rollout, with which `collect` returns the reward.
            row: everything that a reward may read.
        """
        ...

    def collect(self) -> dict[int, Reward]:
        """Wait for and return the rewards of everything submitted since the last call."""
        ...


class StepEnds(Protocol):
    """Function that maps tokens to the positions in the text at which they end (data/chat.py)."""

    def __call__(self, token_ids: Sequence[int]) -> list[int]:
        """Return for each token the number of characters up to and including it."""
        ...


def locate_step_tokens(
    reward: Reward, completion: Completion, ends_of: StepEnds
) -> tuple[tuple[int, float], ...] | None:
    """Return (end_token, value) of each step of a process reward; None for a reward without steps.

    The end token of a step contains the last character of the step. A step that ends with the text ends with the last
    token of the completion, which may be EOS.
    """
    if reward.steps is None:
        return None
    ends, last = ends_of(completion.token_ids.tolist()), len(completion.token_ids) - 1
    return tuple(
        (last if end >= len(completion.text) - 1 else min(bisect_right(ends, end), last), value)
        for end, value in reward.steps
    )


class SamplingFailedError(RuntimeError):
    """The engine of a rank failed, or returned what cannot be right. Raised on every rank; no rollout was used."""


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
        self._generator, self._scorer, self._timers = generator, scorer, timers
        self._collectives, self._ranks, self._component_names = collectives, collectives.ranks, tuple(component_names)
        self._prompts_per_wave, self._floor_of, self._ends_of = prompts_per_wave, floor_of, ends_of
        self._special_text_of = special_text_of

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
        failure = None
        try:
            mine = self._sample_own(prompts, request, seed_of)
        except ValueError:  # of the request, on every rank
            raise
        except Exception as error:  # engines raise anything
            failure, mine = f"{type(error).__name__}: {error}", {}
            log.warning("sampling failed on this rank", exc_info=error, extra=FILE_ONLY)
        self._require_no_failure(failure)
        group_size = request.group_size
        with self._timers.phase("reward"):  # most completions were scored during sampling
            return SampledGroups.gather(
                prompts,
                group_size,
                self._scored_rollouts(prompts, group_size, mine),
                share=self._ranks.at.share,
                component_names=self._component_names,
                sum_over_ranks=self._collectives.sum,
            )

    def _sample_own(
        self, prompts: Sequence[Prompt], request: SamplingRequest, seed_of: Sequence[object]
    ) -> dict[int, Completion]:
        """Sample the prompts of this shard, and start their scoring. Return the completions by row of the step."""
        group_size, at = request.group_size, self._ranks.at
        mine: dict[int, Completion] = {}
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
                mine[key] = completion
                if self._scorer is not None and completion.failure is None:
                    self._submit(self._scorer, key, chosen[local], completion)

            seed = derived_seed(*seed_of, wave, at.share)
            self._generator.generate(chosen, replace(request, seed=seed), submit)
        return mine

    def _require_no_failure(self, failure: str | None) -> None:
        """Raise SamplingFailedError on every rank if `failure` describes one on any rank. Collective."""
        mine = np.zeros(self._collectives.world_size)
        mine[self._ranks.rank] = failure is not None
        failed = np.flatnonzero(self._collectives.sum(mine)).tolist()
        if not failed:
            return
        if self._scorer is not None:
            self._scorer.collect()  # of rollouts that are sampled again
        where = f"rank {', '.join(map(str, failed))}"
        raise SamplingFailedError(f"sampling failed on {where}: {failure or 'the log of that rank has the reason'}")

    def _scored_rollouts(
        self, prompts: Sequence[Prompt], group_size: int, mine: dict[int, Completion]
    ) -> dict[int, Rollout]:
        """Wait for the remaining scores and return the rollouts of this shard by row; none on ranks without scorer."""
        if self._scorer is None:
            return {}
        rewards = self._scorer.collect()
        found = {}
        for row, completion in mine.items():
            prompt = prompts[row // group_size]
            if completion.failure is not None and self._floor_of is not None:
                reward = self._floor_of(prompt.data_set)
            else:
                reward = rewards[row]
            steps = locate_step_tokens(reward, completion, self._ends_of) if self._ends_of is not None else None
            found[row] = Rollout(prompt, completion, reward, self._ranks.at.replica, steps)
        return found

    def _submit(self, scorer: Scorer, key: int, prompt: Prompt, completion: Completion) -> None:
        """Start the scoring of one completion with everything that a reward may read."""
        special = self._special_text_of(completion.token_ids.tolist()) if self._special_text_of is not None else None
        row = ScoringRow(
            prompt.text,
            completion.text,
            prompt.answer,
            messages=prompt.messages,
            completion_with_special_tokens=special,
            fields=prompt.fields,
            dataset=prompt.data_set,
            index=prompt.index,
        )
        scorer.submit_row(key, row)


def derived_seed(*parts: object) -> int:
    """Return a 31-bit seed that is a function of the parts, equal in every run and process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1

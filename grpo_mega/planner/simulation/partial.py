"""Simulates partial rollouts: slices, quotas, carried groups and dropped groups as in rollout/partial_sampler.py.

All rollouts of a slice begin in its first decode step, so its only events are the ends of rollouts.
Asserted by tests/unit/planner/simulation/test_partial.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grpo_mega.planner.simulation.synchronous import decode_seconds
from grpo_mega.planner.simulation.workload import SampledStep, SimulatedJob


@dataclass(frozen=True)
class PartialSettings:
    """The keys of `sampling.partial`, with a value for each of them."""

    oversubmit: float
    slice_tokens: int
    max_staleness: int


@dataclass
class _OpenGroups:
    """Groups of a shard in the order in which they were begun: N groups of G rollouts.

    Attributes:
        lengths: [N, G] tokens that each rollout will have when it is complete.
        sampled: [N, G] tokens that each rollout has now.
        versions: [N, G] sum of the policy versions of these tokens.
        oldest: [N] version of the oldest token; `NOT_BEGUN` before the first token.
        is_second: [N] bool, the group was dropped before.
    """

    lengths: NDArray[np.int64]
    sampled: NDArray[np.int64]
    versions: NDArray[np.int64]
    oldest: NDArray[np.int64]
    is_second: NDArray[np.bool_]

    @classmethod
    def new(cls, lengths: NDArray[np.int64], *, is_second: bool) -> _OpenGroups:
        """Return groups without tokens."""
        count, zeros = len(lengths), np.zeros_like(lengths)
        return cls(lengths, zeros, zeros.copy(), np.full(count, NOT_BEGUN), np.full(count, is_second))

    def select(self, chosen: NDArray[np.bool_]) -> _OpenGroups:
        """Return the chosen groups."""
        return _OpenGroups(*(value[chosen] for value in vars(self).values()))

    def joined(self, others: _OpenGroups) -> _OpenGroups:
        """Return these groups and then others."""
        pairs = zip(vars(self).values(), vars(others).values(), strict=True)
        return _OpenGroups(*(np.concatenate(pair) for pair in pairs))

    @property
    def is_done(self) -> NDArray[np.bool_]:
        """[N] True if all rollouts of the group are complete."""
        done: NDArray[np.bool_] = (self.sampled == self.lengths).all(axis=1)
        return done


NOT_BEGUN = 2**62


class PartialShard:
    """Simulated sampling of one prompt shard.

    Args:
        job: the job.
        settings: of partial rollouts.
        quota: groups that the shard gives to a step.
        rng: draws the lengths of new groups.
    """

    def __init__(self, job: SimulatedJob, settings: PartialSettings, quota: int, rng: np.random.Generator) -> None:
        self._job, self._settings, self._quota, self._rng = job, settings, quota, rng
        self._groups = _OpenGroups.new(np.zeros((0, job.group_size), np.int64), is_second=False)

    def step(self, version: int) -> SampledStep:
        """Sample the groups of a step.

        Args:
            version: updates behind the present weights.
        """
        dropped = self._fill(version)
        groups, cost = self._groups, self._job.engine
        must_end = np.zeros(len(groups.oldest), np.bool_)
        age = np.where(groups.oldest == NOT_BEGUN, 0, version - groups.oldest)
        too_old_next = groups.is_second & (age + self._job.updates_per_step > self._settings.max_staleness)
        must_end[np.flatnonzero(too_old_next)[: self._quota]] = True
        used, cached = np.zeros(len(groups.oldest), np.bool_), np.zeros(groups.lengths.shape, np.bool_)
        seconds, num_steps, num_tokens = 0.0, 0, 0
        while True:
            self._use_done(used, must_end)
            if used.sum() >= self._quota:
                break
            running = np.flatnonzero(groups.sampled < groups.lengths)[: cost.max_running]
            steps = np.minimum((groups.lengths - groups.sampled).ravel()[running], self._settings.slice_tokens)
            seconds += self._slice_seconds(running, steps, cached)
            groups.sampled.ravel()[running] += steps
            groups.versions.ravel()[running] += version * steps
            begun = np.unique(running // self._job.group_size)
            groups.oldest[begun] = np.minimum(groups.oldest[begun], version)
            num_steps, num_tokens = num_steps + int(steps.max()), num_tokens + int(steps.sum())
        trained, self._groups = groups.select(used), groups.select(~used)
        ages = version * int(trained.lengths.sum()) - int(trained.versions.sum())
        oldest = version - int(trained.oldest.min(initial=version))
        return SampledStep(seconds, seconds, num_steps, num_tokens, trained.lengths.ravel(), ages, oldest, dropped)

    def _fill(self, version: int) -> int:
        """Drop groups that are too old, begin new ones, and return the number of dropped groups."""
        groups, job = self._groups, self._job
        is_old = groups.oldest < version - self._settings.max_staleness
        again = _OpenGroups.new(groups.lengths[is_old], is_second=True)
        groups = groups.select(~is_old).joined(again)
        missing = max(0, math.ceil(self._settings.oversubmit * self._quota) - len(groups.oldest))
        new = _OpenGroups.new(job.lengths.draw(self._rng, missing, job.group_size), is_second=False)
        self._groups = groups.joined(new)
        return int(is_old.sum())

    def _use_done(self, used: NDArray[np.bool_], must_end: NDArray[np.bool_]) -> None:
        """Use complete groups in their order, and keep a place for each group that the step must use."""
        for i in np.flatnonzero(self._groups.is_done & ~used).tolist():
            free = self._quota - int(used.sum())
            if free > 0 and (must_end[i] or free > int((must_end & ~used).sum())):
                used[i] = True

    def _slice_seconds(self, running: NDArray[np.int64], steps: NDArray[np.int64], cached: NDArray[np.bool_]) -> float:
        """Return the seconds of one slice; `cached` marks the rollouts in the KV cache, and is updated."""
        job, cost, groups = self._job, self._job.engine, self._groups
        sampled = groups.sampled.ravel()[running]
        is_cached = cached.ravel()[running]
        members = running // job.group_size
        known = np.unique(np.flatnonzero(cached) // job.group_size)
        new_prompts = np.setdiff1d(members[~is_cached], known).size  # the rollouts of a group share the prompt
        computed = new_prompts * job.prompt_tokens + int(sampled[~is_cached].sum())
        again = cost.recomputed_tokens * int(is_cached.sum())
        cached.ravel()[running] = True
        decoding = decode_seconds(cost, np.zeros_like(steps), steps, sampled + job.prompt_tokens)
        return cost.call + cost.submitted_rollout * len(running) + cost.prefill_token * (computed + again) + decoding


def simulate_partial(job: SimulatedJob, settings: PartialSettings, num_steps: int, seed: int) -> list[SampledStep]:
    """Simulate steps with partial rollouts; the first step has no carried groups.

    Args:
        job: the job.
        settings: of partial rollouts.
        num_steps: number of steps. The first ones train on short answers only, because long ones are still open.
        seed: seed of the lengths.
    """
    rng = np.random.default_rng(seed)
    shards = [PartialShard(job, settings, quota, rng) for quota in job.quotas]
    return [_merged([shard.step(step * job.updates_per_step) for shard in shards]) for step in range(num_steps)]


def _merged(parts: list[SampledStep]) -> SampledStep:
    """Return the step of all shards."""
    return SampledStep(
        max(part.seconds for part in parts),
        float(np.mean([part.seconds for part in parts])),
        sum(part.decode_steps for part in parts),
        sum(part.sampled_tokens for part in parts),
        np.concatenate([part.lengths for part in parts]),
        sum(part.token_ages for part in parts),
        max(part.oldest for part in parts),
        sum(part.dropped_groups for part in parts),
    )

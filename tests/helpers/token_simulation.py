"""Simulations of sampling that make one decode step after the other: the oracle of grpo_mega/planner/simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_mega.planner.simulation.costs import EngineCost, PolicyCost
from grpo_mega.planner.simulation.lengths import AnswerLengths
from grpo_mega.planner.simulation.workload import SimulatedJob


def cost_of(max_running: int, **changes: Any) -> EngineCost:
    """Return costs with a part that is bound by computing and one that is bound by reading."""
    values: dict[str, Any] = {
        "read": [1.0 + 0.01 * n for n in range(max_running + 1)],
        "compute": [1.3 + 0.02 * n for n in range(max_running + 1)],
        "other": [0.5 + 0.03 * n for n in range(max_running + 1)],
        "cached_token": 0.002,
        "prefill_token": 0.004,
        "call": 0.7,
        "submitted_rollout": 0.05,
        "recomputed_tokens": 3.0,
    }
    return EngineCost(**values | changes)


def job_of(cost: EngineCost, **changes: Any) -> SimulatedJob:
    """Return a job of 6 groups of 3 rollouts on 2 engines, of 1 to 194 tokens."""
    lengths = AnswerLengths("test", 200, (np.arange(1, 41), np.arange(2, 30, 3), np.arange(7, 200, 11)))
    values: dict[str, Any] = {
        "lengths": lengths,
        "prompt_tokens": 6,
        "prompts_per_step": 6,
        "group_size": 3,
        "updates_per_step": 2,
        "num_shards": 2,
        "engine": cost,
        "policy": PolicyCost(2.0, 0.05, 0.0001, sync=0.5),
    }
    return SimulatedJob(**values | changes)


def step_seconds(cost: EngineCost, running: int, cached: int) -> float:
    """Return the seconds of one decode step."""
    return max(cost.read[running] + cost.cached_token * cached, cost.compute[running]) + cost.other[running]


@dataclass(eq=False)
class Answer:
    """A rollout: the version of each of its tokens."""

    length: int
    versions: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.versions) == self.length


@dataclass(eq=False)
class Group:
    answers: list[Answer]
    is_second: bool = False

    @property
    def is_done(self) -> bool:
        return all(answer.is_done for answer in self.answers)

    @property
    def oldest(self) -> int | None:
        return min((version for answer in self.answers for version in answer.versions), default=None)

    def is_older_than(self, version: int) -> bool:
        return self.oldest is not None and self.oldest < version


def groups_of(lengths: NDArray[np.int64], *, is_second: bool = False) -> list[Group]:
    return [Group([Answer(n) for n in row], is_second) for row in lengths.tolist()]


def sampled_by_tokens(cost: EngineCost, lengths: Sequence[int], prompt_tokens: int) -> float:
    """Return the seconds of all decode steps, one by one; waiting rollouts begin when places are free."""
    waiting, running, seconds = list(lengths), list[list[int]](), 0.0
    while waiting or running:
        while waiting and len(running) < cost.max_running:
            running.append([0, waiting.pop(0)])
        seconds += step_seconds(cost, len(running), sum(prompt_tokens + done for done, _ in running))
        for rollout in running:
            rollout[0] += 1
        running = [rollout for rollout in running if rollout[0] < rollout[1]]
    return seconds


class PartialOracle:
    """A prompt shard with partial rollouts, written after docs/partial-rollouts.md."""

    def __init__(self, job: SimulatedJob, oversubmit: float, slice_tokens: int, max_staleness: int, quota: int) -> None:
        self.job, self.oversubmit, self.slice_tokens = job, oversubmit, slice_tokens
        self.max_staleness, self.quota = max_staleness, quota
        self.groups: list[Group] = []
        self.dropped = self.dropped_again = 0

    def step(self, version: int, draw: Callable[[int], NDArray[np.int64]]) -> tuple[float, list[Group]]:
        """Return the seconds of sampling and the groups of a step."""
        old = [g for g in self.groups if g.is_older_than(version - self.max_staleness)]
        self.dropped += len(old)
        self.dropped_again += sum(g.is_second for g in old)
        self.groups = [g for g in self.groups if g not in old]
        self.groups += [Group([Answer(a.length) for a in g.answers], is_second=True) for g in old]
        missing = max(0, math.ceil(self.oversubmit * self.quota) - len(self.groups))
        self.groups += groups_of(draw(missing))
        limit = self.max_staleness - self.job.updates_per_step
        must_end = [g for g in self.groups if g.is_second and g.is_older_than(version - limit)]
        must_end, used, seconds, in_cache = must_end[: self.quota], list[Group](), 0.0, set[Answer]()
        while True:
            for group in self.groups:
                free, kept = self.quota - len(used), [g for g in must_end if g not in used]
                if group.is_done and group not in used and free > (0 if group in must_end else len(kept)):
                    used.append(group)
            if len(used) == self.quota:
                break
            seconds += self._slice(version, in_cache)
        in_order = [g for g in self.groups if g in used]
        self.groups = [g for g in self.groups if g not in used]
        return seconds, in_order

    def _slice(self, version: int, in_cache: set[Answer]) -> float:
        cost, prompt = self.job.engine, self.job.prompt_tokens
        open_answers = [(g, a) for g in self.groups for a in g.answers if not a.is_done][: cost.max_running]
        seconds, with_prompt = cost.call, {g for g in self.groups if in_cache & set(g.answers)}
        for group, answer in open_answers:
            seconds += cost.submitted_rollout
            if answer in in_cache:
                seconds += cost.recomputed_tokens * cost.prefill_token
            else:
                computed = len(answer.versions) + (0 if group in with_prompt else prompt)
                seconds += computed * cost.prefill_token
                with_prompt.add(group)
            in_cache.add(answer)
        for _ in range(self.slice_tokens):
            running = [a for _, a in open_answers if not a.is_done]
            if not running:
                break
            seconds += step_seconds(cost, len(running), sum(prompt + len(a.versions) for a in running))
            for answer in running:
                answer.versions.append(version)
        return seconds


class ServerOracle:
    """One engine server that makes one decode step at a time."""

    def __init__(self, cost: EngineCost, prompt: int) -> None:
        self.cost, self.prompt, self.time = cost, prompt, 0.0
        self.waiting: list[tuple[Group, Answer]] = []
        self.running: list[tuple[Group, Answer]] = []
        self.begun: set[Group] = set()
        self.order: list[Group] = []
        self.again: list[Group] = []
        self.must_end: list[Group] = []
        self.num_prompts = 0

    @property
    def end_of_step(self) -> float:
        if not self.running:
            return math.inf
        return self.time + step_seconds(self.cost, len(self.running), self.cached)

    @property
    def cached(self) -> int:
        return sum(self.prompt + len(answer.versions) for _, answer in self.running)

    def begin_waiting(self) -> None:
        while self.waiting and len(self.running) < self.cost.max_running:
            group, answer = self.waiting.pop(0)
            if group not in self.begun:
                self.begun.add(group)
                self.time += self.prompt * self.cost.prefill_token
            self.running.append((group, answer))

    def step(self, version: int) -> bool:
        """Make a decode step; return True if a rollout ends."""
        self.time = self.end_of_step
        for _, answer in self.running:
            answer.versions.append(version)
        before = len(self.running)
        self.running = [(group, answer) for group, answer in self.running if not answer.is_done]
        if len(self.running) == before:
            return False
        self.begin_waiting()
        return True

    @property
    def ready(self) -> list[Group]:
        return [group for group in self.order if group.is_done]

    def take(self, quota: int) -> list[Group]:
        """Remove and return the groups that must end, and the first others that are complete."""
        others = [group for group in self.ready if group not in self.must_end]
        chosen = [*self.must_end, *others[: quota - len(self.must_end)]]
        taken = [group for group in self.order if group in chosen]
        self.order = [group for group in self.order if group not in taken]
        return taken

    def drop(self, version: int) -> list[Group]:
        """Drop groups with older tokens, and return them."""
        old = [group for group in self.order if group.is_older_than(version)]
        self.order = [group for group in self.order if group not in old]
        self.waiting = [(group, answer) for group, answer in self.waiting if group not in old]
        self.running = [(group, answer) for group, answer in self.running if group not in old]
        self.again += [Group([Answer(a.length) for a in group.answers], is_second=True) for group in old]
        return old


def asynchronous_by_tokens(
    job: SimulatedJob, max_staleness: int, num_steps: int, seed: int
) -> tuple[list[float], list[list[Group]], list[Group]]:
    """Return the time at the end of each step, the groups of each step, and the dropped groups."""
    rng, servers = np.random.default_rng(seed), [ServerOracle(job.engine, job.prompt_tokens) for _ in job.quotas]
    pairs = list(zip(servers, job.quotas, strict=True))
    ends, batches, dropped, time, updates = [], [], list[Group](), 0.0, job.updates_per_step

    def begin(step: int) -> None:
        for server, quota in pairs:
            missing = (step + 1 + max_staleness // updates) * quota - server.num_prompts
            new = groups_of(job.lengths.draw(rng, max(0, missing), job.group_size))
            server.num_prompts += len(new)
            server.order += [*server.again, *new]
            server.waiting += [(group, answer) for group in [*server.again, *new] for answer in group.answers]
            server.again = []
            if server.waiting and len(server.running) < job.engine.max_running:
                server.time = max(server.time, time)
                server.begin_waiting()

    for step in range(num_steps):
        version = step * updates
        limit = version + updates - max_staleness  # older second groups would be too old in the next step
        for server, quota in pairs:
            dropped += server.drop(version - max_staleness)
            server.must_end = [g for g in server.order if g.is_second and g.is_older_than(limit)][:quota]
        begin(step)
        while not all(len(s.ready) >= quota and all(g.is_done for g in s.must_end) for s, quota in pairs):
            server = min(servers, key=lambda s: s.end_of_step)
            if server.step(version):
                time = max(time, server.time)
        batch = [group for server, quota in pairs for group in server.take(quota)]
        batches.append(batch)
        completions = np.array([[answer.length for answer in group.answers] for group in batch])
        end = time + job.policy_seconds(completions) - job.policy.sync
        while (server := min(servers, key=lambda s: s.end_of_step)).end_of_step <= end:
            server.step(version)
        for server in servers:
            if server.running and server.time < end:
                server.step(version)
            server.time = max(server.time, end) + job.policy.sync
            prompts = len({group for group, _ in server.running}) * job.prompt_tokens
            sampled = sum(len(answer.versions) for _, answer in server.running)
            server.time += (prompts + sampled) * job.engine.prefill_token
        time = end + job.policy.sync
        ends.append(time)
    return ends, batches, dropped

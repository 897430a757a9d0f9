"""Simulates engine servers that sample while the policy trains (`train.max_staleness`).

- Each server samples a prompt shard. A step takes from each shard its quota of complete groups, those that were begun
  first.
- At the start of a step, groups with a token that is more than `max_staleness` versions old are dropped, and their
  prompts are sampled again. A step waits for second groups that would be too old in the next one, up to its quota.
- While the policy trains on step k, groups are begun up to those of step k + `max_staleness` / updates of a step.
- After each step the servers receive the new weights between two decode steps. They pause for the sync, compute the KV
  cache of their running rollouts again with the new weights, and continue.

It differs from docs/asynchrony.md in one way. There are no slices: another rollout takes the place of a complete one at
once, and a pause can begin after any decode step.

Events are ends of rollouts, ends of steps of the policy, and weight syncs. Asserted by
tests/unit/planner/simulation/test_asynchronous.py.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from grpo_mega.planner.simulation.costs import EngineCost
from grpo_mega.planner.simulation.workload import SimulatedJob, SimulatedMode


@dataclass(eq=False)
class _Group:
    """A group of a prompt shard.

    Attributes:
        lengths: tokens of each rollout.
        num_open: rollouts that are not complete.
        versions: sum of the versions of the sampled tokens.
        oldest: version of the first token; None before it.
        has_prompt: True if the engine has computed the prompt.
        is_second: True if a group of its prompt was dropped before.
        is_reserved: True if the step waits for it.
    """

    lengths: list[int]
    num_open: int
    versions: int = 0
    oldest: int | None = None
    has_prompt: bool = False
    is_second: bool = False
    is_reserved: bool = False

    def count(self, tokens: int, version: int) -> None:
        """Count tokens that weights of this version sampled."""
        self.versions += version * tokens
        if tokens and self.oldest is None:
            self.oldest = version

    def is_older_than(self, version: int) -> bool:
        """Return True if older weights sampled a token."""
        return self.oldest is not None and self.oldest < version


@dataclass
class _Server:
    """State of an engine server.

    Attributes:
        cost: times of its engine.
        prompt_tokens: tokens of every prompt.
        quota: groups that its shard gives to a step.
        time: time up to which it is simulated, in seconds.
        busy: time in which it computed or received weights, in seconds.
        steps: decode steps so far.
        sampled: tokens sampled so far.
        running: heap of (decode step in which the rollout ends, number of the rollout, its group, its length).
        marks: number of a running rollout -> decode step up to which the versions of its tokens are counted.
        cached: tokens in the KV cache.
        waiting: rollouts (group, length) that wait until fewer than `max_running` rollouts run.
        groups: open and complete groups that no step has taken, in the order in which they were begun.
        num_ready: number of complete groups among them.
        num_awaited: number of groups for which the step waits and that are not complete.
        again: dropped groups whose prompts are sampled next.
        num_rollouts: rollouts started so far.
        num_prompts: new prompts begun so far.
    """

    cost: EngineCost
    prompt_tokens: int
    quota: int
    time: float = 0.0
    busy: float = 0.0
    steps: int = 0
    sampled: int = 0
    running: list[tuple[int, int, _Group, int]] = field(default_factory=list)
    marks: dict[int, int] = field(default_factory=dict)
    cached: int = 0
    waiting: deque[tuple[_Group, int]] = field(default_factory=deque)
    groups: list[_Group] = field(default_factory=list)
    num_ready: int = 0
    num_awaited: int = 0
    again: list[_Group] = field(default_factory=list)
    num_rollouts: int = 0
    num_prompts: int = 0

    @property
    def is_ready(self) -> bool:
        """True if the groups of a step are complete."""
        return self.num_ready >= self.quota and self.num_awaited == 0

    def begin(self, lengths: list[list[int]]) -> None:
        """Append to `waiting` the dropped groups, and then new groups with these lengths."""
        self.num_prompts += len(lengths)
        for row, is_second in [*((group.lengths, True) for group in self.again), *((row, False) for row in lengths)]:
            group = _Group(row, len(row), is_second=is_second)
            self.groups.append(group)
            self.waiting.extend((group, length) for length in row)
        self.again.clear()

    def drop(self, version: int) -> int:
        """Drop groups with a token of weights before `version`, and return their number."""
        old = {group for group in self.groups if group.is_older_than(version)}
        if not old:
            return 0
        self.again += [group for group in self.groups if group in old]
        self.groups = [group for group in self.groups if group not in old]
        self.num_ready -= sum(group.num_open == 0 for group in old)
        self.waiting = deque(each for each in self.waiting if each[0] not in old)
        for end, number, group, length in self.running:
            if group in old:
                del self.marks[number]
                self.cached -= self.prompt_tokens + length - (end - self.steps)
        self.running = [each for each in self.running if each[2] not in old]
        heapq.heapify(self.running)
        return len(old)

    def reserve(self, version: int) -> None:
        """Let the step wait for its quota of second groups with a token of weights before `version`."""
        seconds = [group for group in self.groups if group.is_second and group.is_older_than(version)]
        for group in seconds[: self.quota]:
            group.is_reserved = True
            self.num_awaited += group.num_open > 0

    def take(self) -> list[_Group]:
        """Remove and return the groups of a step, in their order: those it waited for, and the first complete ones."""
        ready = [group for group in self.groups if group.num_open == 0]
        chosen = set(sorted(ready, key=lambda group: not group.is_reserved)[: self.quota])  # stable
        self.groups = [group for group in self.groups if group not in chosen]
        self.num_ready -= len(chosen)
        return [group for group in ready if group in chosen]

    def admit(self) -> None:
        """Start waiting rollouts, up to `max_running`; the prompt of a group is computed for its first rollout."""
        computed = 0
        while self.waiting and len(self.running) < self.cost.max_running:
            group, length = self.waiting.popleft()
            if not group.has_prompt:
                group.has_prompt = True
                computed += self.prompt_tokens
            heapq.heappush(self.running, (self.steps + length, self.num_rollouts, group, length))
            self.marks[self.num_rollouts] = self.steps
            self.num_rollouts += 1
            self.cached += self.prompt_tokens
        self._work(computed * self.cost.prefill_token)

    def next_event(self) -> float:
        """Return the time at which the next rollout ends; infinity if none runs."""
        if not self.running:
            return float("inf")
        return self.time + self.cost.decode(len(self.running), self.cached, self.running[0][0] - self.steps)

    def advance(self, until: float, version: int) -> None:
        """Simulate decode steps until the time `until` is reached; the last one may end later.

        No rollout may end before the last of these steps.
        """
        if not self.running:
            self.time = max(self.time, until)
            return
        most = self.running[0][0] - self.steps
        self._decode(self.cost.steps_until(len(self.running), self.cached, until - self.time, most))
        self._end_rollouts(version)

    def finish_rollouts(self, version: int) -> None:
        """Simulate the decode steps up to the next end of a rollout."""
        self._decode(self.running[0][0] - self.steps)
        self._end_rollouts(version)

    def _end_rollouts(self, version: int) -> None:
        """Remove the rollouts that are complete, and start waiting ones."""
        while self.running and self.running[0][0] == self.steps:
            _, number, group, length = heapq.heappop(self.running)
            group.count(self.steps - self.marks.pop(number), version)
            self.cached -= self.prompt_tokens + length
            group.num_open -= 1
            if group.num_open == 0:
                self.num_ready += 1
                self.num_awaited -= group.is_reserved
        self.admit()

    def push(self, version: int, pause: float) -> None:
        """Receive new weights: count the tokens of the old `version`, pause, and compute the KV cache again."""
        for _, number, group, _ in self.running:
            group.count(self.steps - self.marks[number], version)
            self.marks[number] = self.steps
        self.time += pause
        self.busy += pause
        groups = len({group for _, _, group, _ in self.running})
        sampled = self.cached - len(self.running) * self.prompt_tokens
        self._work((sampled + groups * self.prompt_tokens) * self.cost.prefill_token)

    def _decode(self, steps: int) -> None:
        running = len(self.running)
        self._work(self.cost.decode(running, self.cached, steps))
        self.steps += steps
        self.cached += running * steps
        self.sampled += running * steps

    def _work(self, seconds: float) -> None:
        self.time += seconds
        self.busy += seconds


class AsynchronousRun:
    """Simulated run of a policy and its engine servers.

    Args:
        job: the job; each of its shards has one server.
        max_staleness: largest allowed number of updates between the weights of a trained token and the policy's.
        seed: seed of the lengths.
    """

    def __init__(self, job: SimulatedJob, max_staleness: int, seed: int) -> None:
        self._job, self._max_staleness, self._rng = job, max_staleness, np.random.default_rng(seed)
        self._ahead = max_staleness // job.updates_per_step
        self._servers = [_Server(job.engine, job.prompt_tokens, quota) for quota in job.quotas]
        self._dropped, self._step, self._time = 0, 0, 0.0
        self.trained: list[list[_Group]] = []
        self.ages: list[tuple[int, int]] = []

    def run(self, num_steps: int, warm_steps: int) -> SimulatedMode:
        """Simulate steps; return the mean values of the steps after the warm-up.

        Args:
            num_steps: number of steps in the means.
            warm_steps: number of warm-up steps before them.
        """
        waited = busy = 0.0
        measured = (0.0, 0.0, 0, 0, 0)
        for step in range(warm_steps + num_steps):
            if step == warm_steps:
                measured, waited = self._state(), 0.0
            self._drop_old_groups()
            self._begin_groups()
            waited += self._wait_for_groups()
            batch = [group for server in self._servers for group in server.take()]
            self._record(batch)
            self._train(np.array([group.lengths for group in batch]))
        time, busy, steps, sampled, dropped = (b - a for a, b in zip(measured, self._state(), strict=True))
        policy, servers = self._job.policy_devices, self._job.server_devices
        idle = policy * waited + servers * (time - busy / len(self._servers))
        batches, ages = self.trained[warm_steps:], self.ages[warm_steps:]
        tokens = sum(sum(group.lengths) for batch in batches for group in batch)
        prompts = num_steps * self._job.prompts_per_step * self._job.group_size * self._job.prompt_tokens
        return SimulatedMode(
            f"asynchronous, max_staleness {self._max_staleness}",
            policy,
            servers,
            time / num_steps,
            self._job.updates_per_step,
            idle_share=float(idle / (self._job.devices * time)),
            running=sampled / max(1, steps),
            tokens_per_step=(tokens + prompts) / num_steps,
            staleness_mean=sum(total for total, _ in ages) / tokens,
            staleness_max=max(oldest for _, oldest in ages),
            dropped_groups=dropped / num_steps,
        )

    @property
    def _version(self) -> int:
        return self._step * self._job.updates_per_step

    def _state(self) -> tuple[float, float, int, int, int]:
        servers = self._servers
        return (
            self._time,
            sum(server.busy for server in servers),
            sum(server.steps for server in servers),
            sum(server.sampled for server in servers),
            self._dropped,
        )

    def _begin_groups(self) -> None:
        """Begin as many groups as `max_staleness` allows, and the groups of dropped prompts."""
        job = self._job
        for server in self._servers:
            allowed = (self._step + 1 + self._ahead) * server.quota
            drawn = job.lengths.draw(self._rng, max(0, allowed - server.num_prompts), job.group_size)
            server.begin(drawn.tolist())
            if server.waiting and len(server.running) < job.engine.max_running:
                server.advance(self._time, self._version)
                server.admit()

    def _wait_for_groups(self) -> float:
        """Simulate the servers until each has the groups of a step; return the seconds for which the policy waits."""
        begin = self._time
        while not all(server.is_ready for server in self._servers):
            self._time = max(self._time, self._next_end())
        return self._time - begin

    def _next_end(self) -> float:
        """Simulate up to the next end of a rollout; return its time."""
        server = min(self._servers, key=_Server.next_event)
        assert server.running, "no rollout runs, and a shard lacks groups"
        server.finish_rollouts(self._version)
        return server.time

    def _drop_old_groups(self) -> None:
        """Drop groups that are too old for the step, and reserve places for second groups."""
        oldest = self._version - self._max_staleness
        for server in self._servers:
            self._dropped += server.drop(oldest)
            server.reserve(oldest + self._job.updates_per_step)

    def _record(self, batch: list[_Group]) -> None:
        tokens = sum(sum(group.lengths) for group in batch)
        age = self._version * tokens - sum(group.versions for group in batch)
        oldest = self._version - min(group.oldest or 0 for group in batch)
        self.trained.append(batch)
        self.ages.append((age, oldest))

    def _train(self, lengths: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> None:
        """Simulate the servers while the policy trains, and the weight sync after it."""
        seconds = self._job.policy_seconds(lengths)
        pause = self._job.policy.sync
        end = self._time + seconds - pause
        while min(map(_Server.next_event, self._servers)) <= end:
            self._next_end()
        for server in self._servers:
            server.advance(end, self._version)
            server.push(self._version, pause)
        self._time, self._step = end + pause, self._step + 1

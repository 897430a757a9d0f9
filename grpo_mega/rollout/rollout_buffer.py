"""The buffer between an engine server that samples and a policy that trains: groups in progress and complete groups.

`begin_step` drops groups that are too old, `put` replaces degenerate groups, `get` takes the groups of a step, and
`metrics` counts what happened. Open groups are in the buffer too. The content of the buffer, which a checkpoint saves,
and the number of prompts that were begun therefore say which prompts were used. Any thread may call any method.
Asserted by tests/unit/rollout/test_rollout_buffer.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from grpo_mega.rollout.carried_rollouts import CarriedRollouts, OpenGroup, PromptOf
from grpo_mega.rollout.staleness import StalenessLimit
from grpo_mega.rollout.step_quota import StepQuota
from grpo_mega.types import Rollout


@dataclass(frozen=True)
class BufferLimits:
    """Limits of a buffer.

    Attributes:
        quota: groups that the shard gives to a step.
        group_size: rollouts of each group.
        staleness: limit of the age of groups.
        max_discarded: number of degenerate groups that may be discarded between two steps; 0: all are kept.
    """

    quota: int
    group_size: int
    staleness: StalenessLimit
    max_discarded: int = 0

    @property
    def steps_ahead(self) -> int:
        """Number of steps whose groups the buffer may hold while the policy trains."""
        return self.staleness.max_staleness // self.staleness.updates_per_step


@dataclass(frozen=True)
class BufferMetrics:
    """Counts since the last call of `RolloutBuffer.metrics`.

    Attributes:
        ready: number of complete and scored groups when the step took its groups.
        dropped: groups that were dropped because of their age.
        discarded: degenerate groups that were replaced by others.
        wait_seconds: time for which the sampler had nothing to sample or was paused.
    """

    ready: int = 0
    dropped: int = 0
    discarded: int = 0
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class TakenGroups:
    """Groups that a step trains on.

    Attributes:
        numbers: numbers of their prompts, in the order in which the groups were begun.
        rollouts: their rollouts; the key is number * group_size + member.
        rest: the other groups of the buffer, for the checkpoint of this step.
    """

    numbers: Sequence[int]
    rollouts: Mapping[int, Rollout]
    rest: CarriedRollouts


class RolloutBuffer:
    """The open and the complete groups of one prompt shard.

    `changed` guards all fields and is notified after every change. Methods may be called by a thread that holds it.

    Args:
        carried: groups and prompts with which the buffer begins.
        limits: of the buffer.
        prompt_of: returns the prompt with a number.
        is_degenerate: returns True if the rewards of a group give no training signal.
    """

    def __init__(
        self,
        carried: CarriedRollouts,
        limits: BufferLimits,
        prompt_of: PromptOf,
        is_degenerate: Callable[[Sequence[Rollout]], bool],
    ) -> None:
        self.changed = threading.Condition()
        self._carried, self._limits, self._prompt_of, self._is_degenerate = carried, limits, prompt_of, is_degenerate
        self._scoring = set[OpenGroup]()
        self._scored: dict[OpenGroup, Sequence[Rollout]] = {}
        self._version, self._is_training = 0, False
        self._num_discarded = 0  # since the last step
        self._metrics = BufferMetrics()

    def begin_step(self, policy_version: int) -> None:
        """Drop groups that are too old for a step with these weights; their prompts are sampled again before others."""
        with self.changed:
            self._version = policy_version
            self._carried, dropped = self._limits.staleness.drop_old(self._carried, policy_version)
            kept = set(self._carried.groups)
            self._scored = {group: rollouts for group, rollouts in self._scored.items() if group in kept}
            self._metrics = replace(self._metrics, dropped=self._metrics.dropped + dropped)
            self.changed.notify_all()

    def weights_changed(self) -> None:
        """Note that the servers have the weights of the next step: they may begin the groups of one step more."""
        with self.changed:
            self._is_training = False
            self.changed.notify_all()

    def groups_to_sample(self) -> list[OpenGroup]:
        """Begin as many groups as `max_staleness` allows, and return all that are not complete."""
        with self.changed:
            limits = self._limits
            most = limits.quota * (limits.steps_ahead + (not self._is_training))
            self._carried = self._carried.fill(most, limits.group_size, self._prompt_of)
            return [group for group in self._carried.groups if not group.is_done]

    def continued(self, groups: Mapping[OpenGroup, OpenGroup]) -> None:
        """Replace groups by their continuations; a continuation of a group that was dropped meanwhile is discarded.

        Args:
            groups: continuation of each group that was returned by `groups_to_sample`.
        """
        with self.changed:
            self._carried = replace(
                self._carried, groups=tuple(groups.get(group, group) for group in self._carried.groups)
            )
            self.changed.notify_all()

    def groups_to_score(self) -> list[OpenGroup]:
        """Return the complete groups that an earlier call has not returned."""
        with self.changed:
            known = self._scoring | self._scored.keys()
            found = [group for group in self._carried.groups if group.is_done and group not in known]
            self._scoring |= set(found)
            return found

    def put(self, group: OpenGroup, rollouts: Sequence[Rollout]) -> None:
        """Add the scored rollouts of a group of `groups_to_score`, unless it was dropped or is degenerate."""
        with self.changed:
            self._scoring.discard(group)
            if group not in self._carried.groups:
                return
            if self._num_discarded < self._limits.max_discarded and self._is_degenerate(rollouts):
                others = tuple(each for each in self._carried.groups if each is not group)
                self._carried = replace(self._carried, groups=others)
                self._num_discarded += 1
                self._metrics = replace(self._metrics, discarded=self._metrics.discarded + 1)
            else:
                self._scored[group] = rollouts
            self.changed.notify_all()

    def requeue_scoring(self) -> None:
        """Forget which groups are being scored, so that `groups_to_score` returns them again. Call after a failure."""
        with self.changed:
            self._scoring.clear()

    def is_ready(self) -> bool:
        """Return True if enough groups for a step are complete and scored."""
        with self.changed:
            return self._quota().is_reached

    def get(self) -> TakenGroups:
        """Remove and return the groups of a step: the first complete and scored ones. `is_ready` must be True."""
        with self.changed:
            quota, size = self._quota(), self._limits.group_size
            assert quota.is_reached, f"{len(self._scored)} scored groups, but a step needs {self._limits.quota}"
            self._metrics = replace(self._metrics, ready=len(self._scored))
            used = quota.groups()
            rollouts = {
                group.number * size + member: rollout
                for group in used
                for member, rollout in enumerate(self._scored.pop(group))
            }
            others = tuple(group for group in self._carried.groups if group not in set(used))
            self._carried = replace(self._carried, groups=others)
            self._is_training, self._num_discarded = True, 0
            self.changed.notify_all()
            return TakenGroups([group.number for group in used], rollouts, self._carried)

    def add_wait(self, seconds: float) -> None:
        """Add time for which the sampler waited."""
        with self.changed:
            self._metrics = replace(self._metrics, wait_seconds=self._metrics.wait_seconds + seconds)

    def metrics(self) -> BufferMetrics:
        """Return the counts since the last call."""
        with self.changed:
            taken, self._metrics = self._metrics, BufferMetrics()
            return taken

    def _quota(self) -> StepQuota:
        limits = self._limits
        must_end = partial(limits.staleness.must_end, policy_version=self._version)
        quota = StepQuota(self._carried.groups, limits.quota, must_end, self._scored.__contains__)
        quota.take_done()
        return quota

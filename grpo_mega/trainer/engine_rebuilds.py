"""Rebuilds the engines of all ranks after a failure, in the processes that are running, and samples or syncs again.

A failure on any rank is raised on all (`rollout.sampler.SamplingFailedError`). Then every rank closes its engine,
builds it again, connects it with the policy, and receives the weights. The step is sampled again with the same seeds,
so the run equals one without the failure. Processes of an engine that exited, or are stopped, while it slept are found
before the next weight sync (`replace_lost`), and those that exit or are stopped during a sync after it
(`repeat_if_lost`). An engine of a server is connected again, with a spare server or one that was started again.
A failure of the device itself (a sticky CUDA error) cannot be repaired in the process: the rebuild fails, the run ends
with exit code 1, and `launch/train.sh --restarts N` continues it.
Asserted by tests/unit/trainer/test_engine_rebuilds.py and tests/e2e/test_engine_failure.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol, TypeVar, cast, runtime_checkable

from grpo_mega.interfaces import Engine, SyncPeers, WeightSink
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.observe.log import FILE_ONLY
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.rollout.sampler import SamplingFailedError
from grpo_mega.trainer.phases import Phases
from grpo_mega.types import Completion, Prompt, SamplingRequest, UserError, WeightMismatchError
from grpo_mega.weight_sync.sync import SyncReport, WeightSync

log = logging.getLogger(__name__)
T = TypeVar("T")


@runtime_checkable
class ServedEngine(Protocol):
    """The additional method of an engine that runs in a server."""

    def generate_on_this_rank(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
        *,
        is_cancelled: Callable[[], bool],
    ) -> list[list[Completion]]:
        """Sample without the other ranks of the job, with an engine server.

        Args:
            prompts: see `Engine.generate`, and so are `sampling` and `on_completion`.
            sampling: of the call.
            on_completion: called with each completion.
            is_cancelled: asked at least every second; True ends the call with a RuntimeError.
        """
        ...


class RebuildableEngine:
    """`Engine` that passes every call to the present engine of this rank."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        """Build the first engine by `make`, which is collective."""
        self._make, self._engine, self._steps_before = make, make(), 0

    def rebuild(self) -> None:
        """Close the engine and build another one. Collective."""
        self._steps_before += self._engine.steps
        try:
            self._engine.close()
        except Exception as error:  # it has failed before
            log.warning("closing the engine that failed: %s", error)
        self._engine = self._make()

    @property
    def is_served(self) -> bool:
        """True if the engine runs in a server."""
        return isinstance(self._engine, ServedEngine)

    @property
    def policy_version(self) -> int:
        """Number of updates behind the weights; -1 before the first sync."""
        return self._engine.policy_version

    @property
    def steps(self) -> int:
        """Steps of all engines so far."""
        return self._steps_before + self._engine.steps

    @property
    def sink(self) -> WeightSink:
        """The engine's end of a weight sync on this rank."""
        return self._engine.sink

    def sync_peers(
        self, shapes: dict[str, tuple[int, ...]], where: str, *, bucket_bytes: int, transport: str
    ) -> SyncPeers | None:
        """Connect with the ranks of engine servers.

        Args:
            shapes: as in `Engine.sync_peers`, and so are the others.
            where: coordinates of this rank.
            bucket_bytes: `weight_sync.bucket_bytes`.
            transport: `weight_sync.transport`.
        """
        return self._engine.sync_peers(shapes, where, bucket_bytes=bucket_bytes, transport=transport)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample; see `Engine.generate`."""
        return self._engine.generate(prompts, sampling, on_completion)

    def generate_on_this_rank(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
        *,
        is_cancelled: Callable[[], bool],
    ) -> list[list[Completion]]:
        """Sample without the other ranks of the job. See `ServedEngine`."""
        engine = self._engine
        assert isinstance(engine, ServedEngine), "only servers sample in the background"
        return engine.generate_on_this_rank(prompts, sampling, on_completion, is_cancelled=is_cancelled)

    def take_gauges(self) -> EngineGauges:
        """Return the gauges since the last call."""
        return self._engine.take_gauges()

    def fault(self) -> str:
        """Return why the engine cannot be used any more, or an empty string."""
        return self._engine.fault()

    def sleep(self) -> None:
        """Release KV cache and weights."""
        self._engine.sleep()

    def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        """Allocate the memory that `sleep` released."""
        self._engine.wake(what)

    def close(self) -> None:
        """Free all resources."""
        self._engine.close()


class RebuildableSync:
    """The present connection of policy and engines on this rank, with the members of `WeightSync` that a run uses."""

    def __init__(self, make: Callable[[], WeightSync]) -> None:
        """Build the first connection by `make`, which is collective."""
        self._make, self._sync = make, make()

    def rebuild(self) -> None:
        """Connect the policy with new engines. Collective."""
        self._sync = self._make()

    @property
    def count(self) -> int:
        """Number of pushes to the present engines that succeeded."""
        return self._sync.count

    def push(self, policy_version: int, *, verify: bool) -> SyncReport:
        """Transfer the policy's weights; see `WeightSync.push`."""
        return self._sync.push(policy_version, verify=verify)

    def verify_after_sampling(self) -> None:
        """Compare the engines' weights with the last push; see `WeightSync.verify_after_sampling`."""
        self._sync.verify_after_sampling()

    def describe_checks(self) -> str:
        """Describe what the last push checked, for messages."""
        return self._sync.describe_checks()


class EngineRebuilds:
    """Samples, with rebuilds of the engines after failures.

    Args:
        engine: of this rank.
        sync: of this rank.
        phases: state of the device.
        limit: number of rebuilds of this start of the run (`guard.max_engine_rebuilds`).
        timers: a rebuild counts as the phase `start`.
        first_fault: returns the first text that is not empty among those of all ranks, with its rank. Collective.
    """

    def __init__(
        self,
        engine: RebuildableEngine,
        sync: RebuildableSync,
        phases: Phases,
        limit: int,
        timers: PhaseTimer,
        first_fault: Callable[[str], str],
    ) -> None:
        self._engine, self._sync, self._phases, self._limit = engine, sync, phases, limit
        self._timers, self._first_fault = timers, first_fault
        self.count = 0
        """Rebuilds so far."""

    def sample(self, action: Callable[[], T], push: Callable[[], object]) -> T:
        """Return the result of `action`, which samples, and repeats it after each rebuild. Collective.

        Args:
            action: samples; it has no effect if it fails.
            push: sends the weights to the engines.

        Raises:
            RuntimeError: it failed more often than allowed, or the engines cannot be rebuilt.
        """
        while True:
            try:
                return action()
            except SamplingFailedError as error:
                reason = str(error)  # without the frames of the failed call, which hold the engine
            self._rebuild(reason, ", and the samples are drawn again")
            push()

    def replace_lost(self) -> None:
        """Rebuild the engines if the processes of one are gone or stopped; a push must follow. Collective.

        Raises:
            RuntimeError: they were rebuilt as often as allowed, or cannot be rebuilt.
        """
        if reason := self._first_fault(self._engine.fault()):
            self._rebuild(reason, "")

    def repeat_if_lost(self, action: Callable[[], T]) -> T:
        """Return the result of `action`, and repeat it if an engine was lost meanwhile. Collective.

        Args:
            action: sends the weights to the engines, or compares them again; if an engine fails, it raises
                WeightMismatchError on all ranks. After a rebuild nothing was sent, so there is nothing to compare.

        Raises:
            WeightMismatchError: the weights differ, or an engine failed whose processes are still running.
            RuntimeError: of `action`; or engines were lost more often than allowed, or cannot be rebuilt.
        """
        while True:
            try:
                return action()
            except WeightMismatchError:
                lost = self._first_fault(self._engine.fault())
                if not lost:
                    raise
                reason = f"the weight sync failed: {lost}"  # without the frames of the call, which hold the engine
            self._rebuild(reason, ", and the sync is repeated")

    def push_to_servers(self, push: Callable[[], T]) -> T:
        """Return the result of `push`, which sends the weights, and repeats it if it failed on any rank. Collective.

        The ranks do not notice at the same time, or not all of them, that a server was lost; so they agree.

        Args:
            push: sends the weights to the engine servers.

        Raises:
            WeightMismatchError: the weights differ, or the engine of a server failed.
            RuntimeError: the sync failed more often than allowed, or no server is available.
        """
        while True:
            failure = ""
            result: T | None = None
            try:
                result = push()
            except WeightMismatchError:  # on every rank
                raise
            except RuntimeError as error:
                failure = str(error)
                log.warning("the weight sync failed on this rank", exc_info=error, extra=FILE_ONLY)
            if not (failure := self._first_fault(failure)):
                return cast("T", result)
            self._rebuild(f"the weight sync failed: {failure}", ", and the weights are sent again")

    def _rebuild(self, reason: str, then: str) -> None:
        """Rebuild the engines, and again if a server is lost meanwhile."""
        while reason:
            self.count += 1
            if self.count > self._limit:
                raise RuntimeError(
                    f"{reason}; the engines were rebuilt {self.count - 1} times before, as often as "
                    f"guard.max_engine_rebuilds={self._limit} allows"
                )
            log.warning("%s; the engines are rebuilt (%d of %d)%s", reason, self.count, self._limit, then)
            try:
                with self._timers.phase("start"), self._waiting_for_servers():
                    self._phases.rebuild_engine(self._engine.rebuild)
                with self._timers.phase("start"), self._waiting_for_servers():
                    reason = self._connect()
            except UserError as error:  # the config was valid before: a server is gone, or memory is missing
                raise RuntimeError(f"{reason}; the engines cannot be rebuilt: {error}") from error

    def _connect(self) -> str:
        """Connect policy and engines. Return why a server was lost meanwhile, or an empty string."""
        failure = ""
        try:
            with self._phases.reading_weights():
                self._sync.rebuild()
        except WeightMismatchError:  # on every rank
            raise
        except RuntimeError as error:
            if not self._engine.is_served:
                raise
            failure = str(error)
            log.warning("the engines could not be connected on this rank", exc_info=error, extra=FILE_ONLY)
        failure = self._first_fault(failure) if self._engine.is_served else ""
        return f"the engines could not be connected: {failure}" if failure else ""

    def _waiting_for_servers(self) -> AbstractContextManager[None]:
        """Show the launcher that the ranks wait for servers, for at most `guard.timeout_seconds`."""
        return self._timers.waiting_for(lambda: "an engine server") if self._engine.is_served else nullcontext()

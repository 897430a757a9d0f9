"""Collects the groups of a step while engine servers sample the groups of later steps (`train.max_staleness`).

The first rank of each prompt shard has the threads that sample (background_sampler.py) and their buffer
(rollout_buffer.py). The training loop calls the methods of this module, which are collective: all ranks wait for the
groups of a step, pause sampling for a weight sync or an evaluation, and raise a failure of any shard together.

The groups of a step depend on the speed of policy and servers, and not on the seed alone. Every prompt is trained once:
the checkpoint of a step holds the buffer as it was when the step took its groups.
Asserted by tests/unit/rollout/test_async_sampler.py and tests/e2e/test_asynchrony.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np

from grpo_mega.config.schema import Config
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.heartbeat import OTHER_RANKS
from grpo_mega.rollout.background_sampler import BackgroundSampler, SliceRequest
from grpo_mega.rollout.carried_rollouts import CarriedRollouts, PromptOf, PromptShard
from grpo_mega.rollout.engine_calls import EngineCallError
from grpo_mega.rollout.partial_sampler import drop_unfit
from grpo_mega.rollout.rollout_buffer import BufferMetrics, TakenGroups
from grpo_mega.rollout.sampled_groups import AsyncWaits, SampledGroups, StepCarry
from grpo_mega.rollout.sampler import SamplingFailedError
from grpo_mega.rollout.step_quota import gather_step
from grpo_mega.types import SamplingRequest, UserError

log = logging.getLogger(__name__)
_ENGINE, _OTHER, _USER = 1, 2, 3  # kinds of failures; the largest one of all ranks decides
_MAX_TEXT_BYTES = 4000


@dataclass
class AsyncSampler:
    """Source of the groups of all steps, on this rank.

    Attributes:
        make_background: builds the sampling threads from the groups with which they continue; None on all ranks of a
            shard but the first.
        collectives: of this rank.
        timers: timer of the phase `reward`.
        config: sections train, data and guard.
        prompt_of: returns the prompt with a number (carried_rollouts.py).
        policy_version: returns the number of updates behind the engine's weights.
        add_gauges: adds the gauges of the engine to those of the step.
        component_names: names of all reward terms, in the order of the config.
        beat_seconds: longest time for which a rank waits without a collective, so that no rank times out. These
            collectives are not progress: the launcher finds a call of a thread that does not end (heartbeat.py).
    """

    make_background: Callable[[CarriedRollouts], BackgroundSampler] | None
    collectives: ArrayCollectives
    timers: PhaseTimer
    config: Config
    prompt_of: PromptOf
    policy_version: Callable[[], int]
    add_gauges: Callable[[EngineGauges], None]
    component_names: Sequence[str] = ()
    beat_seconds: float = 1.0
    background: BackgroundSampler | None = field(default=None, init=False)
    wait_seconds: float = field(default=0.0, init=False)
    """Time for which this rank has waited for groups and for pauses of sampling since the last step."""

    @property
    def shards(self) -> list[PromptShard]:
        """All prompt shards."""
        count = self.collectives.ranks.topology.num_prompt_shards
        return [PromptShard(i, count, self.config.data.prompts_per_step) for i in range(count)]

    @property
    def shard(self) -> PromptShard:
        """Prompt shard of this rank."""
        return self.shards[self.collectives.ranks.at.prompt_shard]

    def begin(self, step: int, carried: object, request: SamplingRequest, seed_of: Sequence[object]) -> AsyncStep:
        """Begin a step. The first call of a run starts the sampling threads.

        Args:
            step: its number.
            carried: rollouts in the checkpoint from which the run continues; None: there are none. Only the first call
                reads it, because from then on the buffer is newer.
            request: group size, temperature and limits.
            seed_of: values from which, with prompt shard and slice, the seeds are derived.
        """
        if self.make_background is not None:
            if self.background is None:
                if carried is None:
                    carried = CarriedRollouts.after_step(step - 1, self.shard)
                assert isinstance(carried, CarriedRollouts), f"carried rollouts of type {type(carried).__name__}"
                self.background = self.make_background(drop_unfit(carried, request))
            self.background.buffer.begin_step(self.policy_version())
            self.background.start(SliceRequest(request, (*seed_of, self.shard.index)))
        return AsyncStep(self, step, request)

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """Pause sampling for a weight sync; the sampler continues with the new weights. Collective.

        Raises:
            SamplingFailedError, UserError, RuntimeError: see `require_running`.
        """
        with self.pausing_sampling():
            yield
            if self.background is not None:
                self.background.weights_changed()

    @contextmanager
    def pausing_sampling(self) -> Iterator[None]:
        """Pause sampling for another use of the servers. Collective.

        Raises:
            SamplingFailedError: on every rank, if sampling has failed on one.
        """
        with self._paused(["sampling"]):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Pause sampling and scoring for an evaluation, which uses the same server and workers. Collective.

        Raises:
            SamplingFailedError, UserError, RuntimeError: see `require_running`.
        """
        with self._paused(["sampling", "scoring"]):
            yield

    @contextmanager
    def _paused(self, names: Sequence[str]) -> Iterator[None]:
        start, background = time.monotonic(), self.background

        def is_busy() -> bool:
            return background is not None and not background.wait_until_idle(names, self.beat_seconds)

        with nullcontext() if background is None else background.paused(names):
            try:
                self.wait_while(is_busy)
                self.wait_seconds += time.monotonic() - start
                yield
            except BaseException:
                self.close()  # before the pause ends: no thread may use an engine that the caller rebuilds or closes
                raise

    def wait_while(self, is_waiting: Callable[[], bool]) -> None:
        """Wait until `is_waiting` returns False on all ranks. Collective.

        Args:
            is_waiting: waits for threads of this rank, for at most `beat_seconds`; True if it must be called again.

        Raises:
            SamplingFailedError, UserError, RuntimeError: see `require_running`.
        """
        with self.timers.waiting_for(self._awaited):
            while self.require_running(is_waiting=is_waiting()):
                pass

    def require_running(self, *, is_waiting: bool = False) -> bool:
        """Raise if sampling has failed on any rank; return True if `is_waiting` is True on any rank. Collective.

        The threads of all ranks are stopped before an error is raised. An error that is not the engine's has priority:
        it is raised on the rank that has it, and a UserError or a RuntimeError with its text on all others.

        Args:
            is_waiting: True if this rank waits for the groups of a step, or for the end of a call of a thread.

        Raises:
            SamplingFailedError: on every rank, if only engines have failed.
            UserError: on every rank, if the input of a reward or an environment is wrong.
            RuntimeError: sampling or scoring failed for another reason.
        """
        ranks, background = self.collectives.ranks, self.background
        failure = None if background is None else background.failure
        mine = np.zeros(self.collectives.world_size + 1)
        mine[ranks.rank] = _kind_of(failure)
        mine[-1] = is_waiting
        found = self.collectives.sum(mine)
        kinds = found[:-1]
        if not kinds.any():
            return bool(found[-1])
        self.close()
        if kinds.max() == _ENGINE:
            where = f"rank {', '.join(map(str, np.flatnonzero(kinds).tolist()))}"
            raise SamplingFailedError(f"sampling failed on {where}: {failure or 'the log of that rank has the reason'}")
        self._raise_failure(failure, int(kinds.argmax()), is_user_error=kinds.max() == _USER)

    def _raise_failure(self, failure: BaseException | None, first: int, *, is_user_error: bool) -> NoReturn:
        """Raise the error of rank `first` on every rank. Collective."""
        text = np.zeros(_MAX_TEXT_BYTES)
        if self.collectives.ranks.rank == first:
            content = str(failure) if is_user_error else f"{type(failure).__name__}: {failure}"
            encoded = np.frombuffer(content.encode()[:_MAX_TEXT_BYTES], np.uint8)
            text[: len(encoded)] = encoded
        received = bytes(self.collectives.sum(text).astype(np.uint8)).rstrip(b"\0").decode(errors="replace")
        if self.collectives.ranks.rank == first and isinstance(failure, Exception):
            raise failure
        if is_user_error:
            raise UserError(received)
        raise RuntimeError(f"sampling during training failed on rank {first}: {received}") from failure

    def _awaited(self) -> str:
        """Return for what this rank waits, for the launcher."""
        threads = [] if self.background is None else self.background.busy_threads()
        return f"the call of its thread {' and '.join(threads)}" if threads else OTHER_RANKS

    def close(self) -> None:
        """Stop the sampling threads. `begin` starts them again, with the same groups."""
        if self.background is not None:
            self.background.stop()


class AsyncStep:
    """Sampling of one step. Its methods are collective.

    Args:
        owner: sampler of this rank.
        step: number of the step.
        request: group size, temperature and limits.
    """

    def __init__(self, owner: AsyncSampler, step: int, request: SamplingRequest) -> None:
        self._owner, self._request = owner, request
        self._version = owner.policy_version()
        self._rest = CarriedRollouts.after_step(step, owner.shard)  # on ranks that do not sample
        self._metrics = BufferMetrics()

    def first(self) -> SampledGroups:
        """Wait for the groups of the step, and return them."""
        owner, start, background = self._owner, time.monotonic(), self._owner.background

        def is_waiting() -> bool:
            return background is not None and not background.wait_until_ready(owner.beat_seconds)

        owner.wait_while(is_waiting)
        owner.wait_seconds += time.monotonic() - start
        taken = TakenGroups((), {}, self._rest)
        if background is not None:
            taken = background.buffer.get()
            self._rest, self._metrics = taken.rest, background.buffer.metrics()
            owner.add_gauges(background.take_gauges())
        with owner.timers.phase("reward"):
            groups = gather_step(
                taken.numbers,
                taken.rollouts,
                np.array([shard.quota for shard in owner.shards], dtype=np.int64),
                self._request.group_size,
                collectives=owner.collectives,
                prompt_of=owner.prompt_of,
                component_names=owner.component_names,
            )
        discarded = owner.collectives.sum(np.array([float(self._metrics.discarded)]))
        return replace(groups, num_discarded=int(discarded[0]))

    def refill(self, groups: SampledGroups, places: Sequence[int]) -> SampledGroups | None:
        """Return None: degenerate groups were replaced when they were put into the buffer."""
        return None

    def finish(self, groups: SampledGroups) -> SampledGroups:
        """Return the groups with the rest of the buffer, for the checkpoint, and the waits since the last step."""
        owner, rest, metrics = self._owner, self._rest, self._metrics
        waited, owner.wait_seconds = owner.wait_seconds, 0.0
        counts = [metrics.dropped, len(rest.groups), rest.num_tokens, metrics.ready, metrics.wait_seconds]
        found = owner.collectives.gather(np.array([*map(float, counts), waited]))
        dropped, num_groups, num_tokens, ready = (int(n) for n in found[:, :4].sum(axis=0).tolist())
        waits = AsyncWaits(ready, float(found[:, 5].max()), float(found[:, 4].max()))
        return replace(groups, carry=StepCarry(rest, self._version, dropped, num_groups, num_tokens, waits))


def _kind_of(failure: BaseException | None) -> int:
    if failure is None:
        return 0
    if isinstance(failure, EngineCallError):
        return _ENGINE
    return _USER if isinstance(failure, UserError) else _OTHER

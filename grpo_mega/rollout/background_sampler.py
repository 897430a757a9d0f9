"""Samples the rollouts of a prompt shard in the background, while the policy trains.

One thread samples slices of all open groups (slices.py), and another one scores complete groups, so that a slow reward
delays no slice. A thread can be paused between two slices, or between two calls of the reward workers. A weight sync
pauses the sampling thread, and an evaluation pauses both. The engine gets prompt and tokens so far with each slice.
After a weight sync it computes their KV cache again; every token keeps the version of the weights that sampled it.
An exception of a thread ends both threads. `failure` is an EngineCallError only if the engine itself has failed.
Asserted by tests/unit/rollout/test_async_sampler.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.observe.log import FILE_ONLY
from grpo_mega.rollout.carried_rollouts import OpenGroup
from grpo_mega.rollout.engine_calls import MarkedEngine
from grpo_mega.rollout.rollout_buffer import RolloutBuffer
from grpo_mega.rollout.sampler import derived_seed
from grpo_mega.rollout.scoring import RolloutScoring
from grpo_mega.rollout.slices import SliceSampler
from grpo_mega.types import SamplingRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SliceRequest:
    """Settings that all slices of a step have in common.

    Attributes:
        request: group size, temperature and limits; its seed is replaced.
        seed_of: values from which, with the number of the slice, the seeds are derived.
    """

    request: SamplingRequest
    seed_of: tuple[object, ...]


class BackgroundSampler:
    """Threads of the first rank of a prompt shard. They can be started again after `stop`.

    Args:
        buffer: holds all groups.
        slices: samples with the engine of this rank, without other ranks.
        scoring: scores complete groups.
        take_gauges: returns the gauges of the engine since the last call.
        cancelled: this object sets the event to end the current call of the engine with an error.
    """

    def __init__(
        self,
        buffer: RolloutBuffer,
        slices: SliceSampler,
        scoring: RolloutScoring,
        take_gauges: Callable[[], EngineGauges],
        cancelled: threading.Event,
    ) -> None:
        self.buffer, self._scoring = buffer, scoring
        self._slices = replace(slices, engine=MarkedEngine(slices.engine))
        self._take_gauges, self._cancelled = take_gauges, cancelled
        self._changed = buffer.changed
        self.threads: list[threading.Thread] = []
        """The threads between `start` and `stop`."""
        self._is_stopping = False
        self._pauses = {"sampling": 0, "scoring": 0}
        self._busy = {"sampling": False, "scoring": False}
        self._request: SliceRequest | None = None
        self._num_slices = 0  # of the current step
        self._has_cache = False  # True if the engine's cache holds tokens of open groups, computed with its weights
        self._gauges = EngineGauges()
        self.failure: BaseException | None = None
        """Exception of a thread, after which both threads end; None while they run, and after `stop`."""
        self.num_calls = 0
        """Slices and calls of the reward workers that ended; it grows while the threads make progress."""

    def start(self, request: SliceRequest) -> None:
        """Use the request of a step from the next slice on; start the threads if they do not run."""
        with self._changed:
            self._request, self._num_slices = request, 0
            if self.threads:
                return
            self._is_stopping, self._has_cache, self.failure = False, False, None
            self._cancelled.clear()
            for name, work in (("sampling", self._sample_all), ("scoring", self._score_all)):
                self.threads.append(threading.Thread(target=self._run, args=(work,), name=name, daemon=True))
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Stop the threads; only the tokens of the slice in progress are lost. A second call does nothing."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._cancelled.set()
        for thread in self.threads:
            thread.join()
        self.threads, self.failure = [], None
        self.buffer.requeue_scoring()

    @contextmanager
    def paused(self, names: Sequence[str]) -> Iterator[None]:
        """Let the threads of these names begin no call; `wait_until_idle` waits for the end of a call in progress.

        Args:
            names: `sampling`, `scoring` or both.
        """
        with self._changed:
            for name in names:
                self._pauses[name] += 1
        try:
            yield
        finally:
            with self._changed:
                for name in names:
                    self._pauses[name] -= 1
                self._changed.notify_all()

    def wait_until_idle(self, names: Sequence[str], seconds: float) -> bool:
        """Wait for the end of the calls of these threads, at most for `seconds`; return True if there is no call."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(self._busy[name] for name in names), seconds)

    def busy_threads(self) -> list[str]:
        """Return the names of the threads that are in a call of the engine, or of the reward workers."""
        return [name for name, is_busy in self._busy.items() if is_busy]

    def weights_changed(self) -> None:
        """Note that the engine has new weights. Sampling must be paused."""
        self._has_cache = False
        self.buffer.weights_changed()

    def wait_until_ready(self, seconds: float) -> bool:
        """Wait at most `seconds` for the groups of a step; return True if they are complete and scored."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or self.buffer.is_ready(), seconds)
            return self.buffer.is_ready()

    def take_gauges(self) -> EngineGauges:
        """Return the gauges of the engine since the last call."""
        with self._changed:
            taken, self._gauges = self._gauges, EngineGauges()
            return taken

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # engines and rewards raise anything, also SystemExit; all ranks raise it
            with self._changed:
                if self.failure is None and not self._is_stopping:
                    log.warning("sampling in the background failed", exc_info=error, extra=FILE_ONLY)
                    self.failure = error
                self._is_stopping = True
        finally:
            with self._changed:
                self._busy[threading.current_thread().name] = False
                self._changed.notify_all()

    def _sample_all(self) -> None:
        while groups := self._wait_for_groups("sampling", self.buffer.groups_to_sample):
            self._sample_slice(groups)
            self._set_idle("sampling")

    def _sample_slice(self, groups: Sequence[OpenGroup]) -> None:
        assert self._request is not None, "start comes first"
        with self._changed:
            request, seed_of, number = self._request.request, self._request.seed_of, self._num_slices
            self._num_slices += 1
        copies = {group: group.copy() for group in groups}
        open_rollouts = [rollout for copy in copies.values() for rollout in copy.rollouts if not rollout.is_done]
        seed = derived_seed(*seed_of, "slice", number)
        self._slices.sample(open_rollouts, replace(request, seed=seed, continues=self._has_cache))
        gauges = self._take_gauges()
        with self._changed:
            self._has_cache = True
            self._gauges.add(gauges)
        self.buffer.continued(copies)

    def _score_all(self) -> None:
        while groups := self._wait_for_groups("scoring", self.buffer.groups_to_score):
            completed = [rollout for group in groups for rollout in group.rollouts]
            sampled = {i: (each.prompt, each.completion(self._slices.text_of)) for i, each in enumerate(completed)}
            rollouts = iter(self._scoring.score(sampled).values())
            for group in groups:
                self.buffer.put(group, [next(rollouts) for _ in group.rollouts])
            self._set_idle("scoring")

    def _wait_for_groups(self, name: str, find: Callable[[], list[OpenGroup]]) -> list[OpenGroup]:
        """Wait until the thread is not paused and has groups, and return them; return none if the thread must end."""
        with self._changed:
            while not self._is_stopping:
                if not self._pauses[name] and (groups := find()):
                    self._busy[name] = True
                    return groups
                start = time.monotonic()
                self._changed.wait()
                if name == "sampling":
                    self.buffer.add_wait(time.monotonic() - start)
        return []

    def _set_idle(self, name: str) -> None:
        with self._changed:
            self._busy[name] = False
            self.num_calls += 1
            self._changed.notify_all()

"""Finds ranks of this machine that make no progress, from their heartbeats and the states of their processes.

A rank makes progress when it enters a phase or a collective or its engine makes a step; in the phases that read or
write files also while it reads and writes at least 64 KiB/s: the metrics of the hardware read a little all the time. A
job has stalled if a process of it is stopped (SIGSTOP, a debugger) for longer than the limit of its phase, or if no
rank has made progress for longer than the limits of all.

The limit of a phase is `guard.phase_limits`, else the larger of 60 s and 6 times the median of its time per step. Until
a phase has been measured, it is `guard.timeout_seconds`, and 60 s for a stopped process; the start, which may read
hundreds of gigabytes, has none then. While ranks wait for background threads (`Beat.awaited`), the time of the phase
says nothing about the length of a call: the limit is then `guard.phase_limits`, else 60 s more than
`guard.timeout_seconds`, within which a client reports a server that is not responding.
Imports no torch. Asserted by tests/unit/launch/test_stall_watch.py.
"""

from __future__ import annotations

import math
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grpo_mega.launch import processes
from grpo_mega.parallel.heartbeat import OUTSIDE, Beat, read_beats

LEAST_SECONDS = 60.0
_TIMES_MEDIAN = 6.0
_KEPT_STEPS = 50  # of which the median is taken
_CHECK_SECONDS = 0.5
_ENGINE_CHECK_SECONDS = 2.0
_FILE_PHASES = ("start", "checkpoint", "rollout", "evaluation", OUTSIDE)
_FILE_BYTES_PER_SECOND = 64 * 1024
_FILE_RATE_SECONDS = 10.0  # over which the rate is computed
_STOPPED_STATES = "Tt"
_ENGINE_MODULES = "grpo_mega.engines."


@dataclass(frozen=True)
class StallLimits:
    """`guard.timeout_seconds`, and `guard.phase_limits`: phase -> seconds."""

    timeout_seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RankStatus:
    """State of a rank, read without its cooperation.

    `idle_seconds`: since its last progress. `limit_seconds`: of its phase. `stopped`: its stopped processes, the rank
    itself or processes of its engine. `engines`: processes of its engine. `awaited`: see `Beat`.
    """

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    collectives: int
    idle_seconds: float
    limit_seconds: float
    stopped: tuple[int, ...] = ()
    engines: tuple[int, ...] = ()
    awaited: str = ""

    @property
    def is_late(self) -> bool:
        """True if the rank has made no progress for longer than the limit of its phase."""
        return self.idle_seconds > self.limit_seconds

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` reads them on another machine."""
        found = asdict(self)
        return {**found, "limit_seconds": None} if math.isinf(self.limit_seconds) else found

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RankStatus:
        """Read what `to_json` has written."""
        limit = values["limit_seconds"]
        lists = {key: tuple(values[key]) for key in ("stopped", "engines")}
        return cls(**{**values, **lists, "limit_seconds": math.inf if limit is None else limit})


def has_stalled(ranks: Sequence[RankStatus]) -> bool:
    """Return True if the job with these ranks, of all machines, has stalled."""
    if not ranks:
        return False
    return any(each.is_late and each.stopped for each in ranks) or all(each.is_late for each in ranks)


class _RankClock:
    """The time of a rank since its last progress, and the time that its phases took per step."""

    def __init__(self, now: float) -> None:
        self.moved = now
        self._progress: tuple[int, ...] = ()
        self._files = (0, -math.inf)  # bytes, and time, from which the rate of reading and writing is computed
        self._entered = (0, "start", now)  # step, phase, time of the change
        self._seconds: dict[str, float] = {}  # phase -> seconds of this step
        self._steps: dict[str, deque[float]] = {}  # phase -> seconds of the last steps

    def update(self, beat: Beat, file_bytes: int, now: float) -> None:
        """Take the newest heartbeat."""
        if beat.progress != self._progress or self._is_using_files(file_bytes, now):
            self._progress, self.moved = beat.progress, now
        step, phase, since = self._entered
        if (step, phase) != (beat.step, beat.phase):
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - since
            self._entered = (beat.step, beat.phase, now)
        if step != beat.step:
            for name, seconds in self._seconds.items():
                self._steps.setdefault(name, deque(maxlen=_KEPT_STEPS)).append(seconds)
            self._seconds = {}

    def _is_using_files(self, file_bytes: int, now: float) -> bool:
        """Return True if the rank has read and written at the least rate since the last mark."""
        before, since = self._files
        is_used = file_bytes - before >= _FILE_BYTES_PER_SECOND * max(now - since, 1.0)
        if is_used or now - since >= _FILE_RATE_SECONDS:
            self._files = (file_bytes, now)
        return is_used

    def median(self, phase: str) -> float | None:
        """Return the median of the seconds of a phase per step, or None if no step with it is complete."""
        known = self._steps.get(phase)
        return statistics.median(known) if known else None


class StallWatch:
    """Watches the ranks of this machine."""

    def __init__(
        self,
        folder: Path,
        pids: Sequence[int],
        ranks: Sequence[int],
        limits: StallLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start to watch.

        Args:
            folder: holds the heartbeats.
            pids: processes of the ranks, by local rank.
            ranks: their numbers in the job.
            limits: of the config.
            clock: monotonic clock in seconds.
        """
        self._folder, self._pids, self._ranks, self._limits, self._clock = folder, pids, ranks, limits, clock
        now = clock()
        self._clocks = [_RankClock(now) for _ in pids]
        self._checked = self._engines_checked = -math.inf
        self._engines: list[tuple[int, ...]] = [() for _ in pids]

    def is_due(self) -> bool:
        """Return True twice a second."""
        return self._clock() - self._checked >= _CHECK_SECONDS

    def statuses(self) -> list[RankStatus]:
        """Return the status of every rank of this machine that is still running."""
        now = self._checked = self._clock()
        if now - self._engines_checked >= _ENGINE_CHECK_SECONDS:
            self._engines_checked = now
            self._engines = [engine_processes(pid) for pid in self._pids]
        beats = read_beats(self._folder)
        found = []
        for local, (pid, beat, clock) in enumerate(zip(self._pids, beats, self._clocks, strict=True)):
            state = processes.state(pid)
            if state in "ZX":
                continue
            file_bytes = processes.file_bytes(pid) if beat.phase in _FILE_PHASES else 0
            clock.update(beat, file_bytes, now)
            own = [pid] if state in _STOPPED_STATES else []
            stopped = (*own, *(each for each in self._engines[local] if processes.state(each) in _STOPPED_STATES))
            found.append(
                RankStatus(
                    self._ranks[local],
                    socket.gethostname(),
                    pid,
                    beat.phase,
                    beat.step,
                    sum(beat.collectives.values()),
                    now - clock.moved,
                    self._limit(beat, clock, is_stopped=bool(stopped)),
                    stopped,
                    self._engines[local],
                    beat.awaited,
                )
            )
        return found

    def _limit(self, beat: Beat, clock: _RankClock, *, is_stopped: bool) -> float:
        phase = beat.phase
        if phase in self._limits.phases:
            return self._limits.phases[phase]
        if beat.awaited and not is_stopped:
            return self._limits.timeout_seconds + LEAST_SECONDS
        median = None if phase == OUTSIDE else clock.median(phase)
        if median is not None:
            return max(LEAST_SECONDS, _TIMES_MEDIAN * median)
        if is_stopped:
            return LEAST_SECONDS
        return math.inf if phase == "start" else max(LEAST_SECONDS, self._limits.timeout_seconds)


def engine_processes(rank_pid: int) -> tuple[int, ...]:
    """Return the processes of the engine that a rank has started beside itself."""
    roots = [child for child in processes.children(rank_pid) if _ENGINE_MODULES in processes.command_line(child)]
    return tuple(each for root in roots for each in (root, *processes.descendants(root)))

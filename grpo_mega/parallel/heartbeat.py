"""The heartbeats of the ranks of a machine, in one file that ranks and launcher map into memory.

A rank writes its phase, its step and counters that only grow while it makes progress: entered phases, steps of its
engine, and, per process group, the sequence number of the last collective. A thread samples the counters twice a
second. The launcher reads the file without any cooperation of the rank, which may be stopped or wait in a library.
A rank that waits for a background thread enters collectives all the time, so that no rank times out. It writes for what
it waits, and these collectives are not progress.
On SIGUSR2 Python's faulthandler writes the stacks of all threads into a file, also while the process waits in a
library. Imports no torch: the launcher uses this module.
Asserted by tests/unit/parallel/test_heartbeat.py.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

FOLDER_VARIABLE = "GRPO_MEGA_HEARTBEATS"
"""Environment variable with the folder of the heartbeats; without it a rank writes none."""
STACKS_SIGNAL = signal.SIGUSR2
_FILE = "heartbeats"
_SLOT_BYTES = 8192  # of one rank
_NUMBERS = struct.Struct("<qqqqq")  # process, step, entered phases, start of the phase [ns], progress of engines
_PHASE_AT, _PHASE_BYTES = 64, 64
_AWAITED_AT, _AWAITED_BYTES = 128, 128
_GROUPS_AT = 256
_SAMPLE_SECONDS = 0.5
_STOP_SECONDS = 2.0
_START = "start"
OUTSIDE = "outside"
"""Phase of a rank between its phases, for example while it writes its last files and exits."""
OTHER_RANKS = "other ranks"
"""`Beat.awaited` of a rank that waits for background threads of other ranks only."""


@dataclass(frozen=True)
class Beat:
    """The last heartbeat of a rank.

    `phase_started`: `time.monotonic()` in seconds, which is the same for all processes of a machine. `collectives`:
    process group -> sequence number of the last collective that the rank has entered. `awaited`: threads of this rank
    for which it waits, or `OTHER_RANKS`; empty outside of `RankHeartbeat.waiting_for`.
    """

    pid: int = 0
    step: int = 0
    entered_phases: int = 0
    phase_started: float = 0.0
    engine_steps: int = 0
    phase: str = _START
    collectives: Mapping[str, int] = field(default_factory=dict)
    awaited: str = ""

    @property
    def progress(self) -> tuple[int, ...]:
        """Numbers of which at least one changes while the rank makes progress."""
        collectives = 0 if self.awaited else sum(self.collectives.values())
        return self.step, self.entered_phases, self.engine_steps, collectives


def make_heartbeats(folder: Path, num_ranks: int) -> None:
    """Create the file for `num_ranks` ranks in `folder`, and the folder for their stacks."""
    (folder / "stacks").mkdir()
    with (folder / _FILE).open("wb") as file:
        file.truncate(num_ranks * _SLOT_BYTES)


def read_beats(folder: Path) -> list[Beat]:
    """Return the last heartbeat of each rank of this machine, by local rank."""
    content = (folder / _FILE).read_bytes()
    return [_read_slot(content[start : start + _SLOT_BYTES]) for start in range(0, len(content), _SLOT_BYTES)]


def _read_slot(slot: bytes) -> Beat:
    pid, step, entered, started, engine_steps = _NUMBERS.unpack_from(slot)
    if pid == 0:
        return Beat()
    phase = _text(slot, _PHASE_AT, _PHASE_BYTES)
    collectives: dict[str, int] = {}
    with suppress(ValueError):  # the rank is writing them at this moment, or has died while it did
        collectives = dict(json.loads(slot[_GROUPS_AT:].partition(b"\0")[0]))
    awaited = _text(slot, _AWAITED_AT, _AWAITED_BYTES)
    return Beat(pid, step, entered, started / 1e9, engine_steps, phase or _START, collectives, awaited)


def _text(slot: bytes, at: int, size: int) -> str:
    return slot[at : at + size].partition(b"\0")[0].decode(errors="replace")


class RankHeartbeat:
    """Writes the heartbeats of this rank. Without a folder, under torchrun for example, it writes none."""

    def __init__(self, folder: Path | None, local_rank: int) -> None:
        """Open the slot of this rank, and start the thread that samples the counters."""
        self._memory: mmap.mmap | None = None
        self._counters: list[Callable[[], int]] = []
        self._step = self._entered = 0
        self._awaited: Callable[[], str] | None = None
        if folder is None:
            return
        with (folder / _FILE).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._start = local_rank * _SLOT_BYTES
        self._phase_started = time.monotonic_ns()
        self.phase(_START)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="heartbeat", daemon=True)
        self._thread.start()
        # a thread that is inside of a library of C++ while Python exits would abort the process
        atexit.register(self._stop)

    def _stop(self) -> None:
        """End the thread, before Python exits."""
        self._stopping.set()
        self._thread.join(_STOP_SECONDS)

    def phase(self, name: str) -> None:
        """Write that this rank enters a phase, or resumes it after a nested one."""
        if self._memory is None:
            return
        self._entered += 1
        self._phase_started = time.monotonic_ns()
        self._write_text(_PHASE_AT, _PHASE_BYTES, name)
        self._write()

    def step(self) -> None:
        """Write that this rank starts the next step."""
        self._step += 1
        self._write()

    def count(self, counter: Callable[[], int]) -> None:
        """Add a counter, for example of the steps of an engine. The thread calls it twice a second."""
        self._counters.append(counter)

    @contextmanager
    def waiting_for(self, awaited: Callable[[], str]) -> Iterator[None]:
        """Write that this rank waits, in the `with` block, for background threads. Its collectives are not progress.

        Args:
            awaited: returns `Beat.awaited`, which is not empty. The thread calls it twice a second.
        """
        self._awaited = awaited
        self._write()
        try:
            yield
        finally:
            self._awaited = None
            self._write()

    def _write_text(self, at: int, size: int, text: str) -> None:
        assert self._memory is not None, "a rank without a folder writes nothing"
        start = self._start + at
        self._memory[start : start + size] = text.encode()[: size - 1].ljust(size, b"\0")

    def _write(self) -> None:
        if self._memory is not None:
            awaited = self._awaited
            self._write_text(_AWAITED_AT, _AWAITED_BYTES, "" if awaited is None else awaited())
            engine_steps = sum(counter() for counter in self._counters)
            numbers = (os.getpid(), self._step, self._entered, self._phase_started, engine_steps)
            _NUMBERS.pack_into(self._memory, self._start, *numbers)

    def _sample(self) -> None:
        assert self._memory is not None, "a rank without a folder samples nothing"
        at, size, last = self._start + _GROUPS_AT, _SLOT_BYTES - _GROUPS_AT, b""
        while not self._stopping.wait(_SAMPLE_SECONDS):
            groups = json.dumps(_collectives()).encode()[: size - 1]
            if groups != last:
                self._memory[at : at + size] = groups.ljust(size, b"\0")
                last = groups
            self._write()


def _collectives() -> dict[str, int]:
    """Return {process group: sequence number of the last collective}, of all groups of this rank that have had one."""
    dist = sys.modules.get("torch.distributed")  # not imported here: before the import there are no groups
    if dist is None or not hasattr(dist, "distributed_c10d") or not dist.is_initialized():
        return {}
    found = {}
    for group, name in list(dist.distributed_c10d._world.pg_names.items()):
        with suppress(RuntimeError, AttributeError):  # the group is being destroyed
            if number := _sequence_number(group):
                found[str(name)] = number
    return found


def _sequence_number(group: object) -> int:
    """Return the sum of the sequence numbers of the group's backends, of which each counts its own collectives."""
    import torch

    kinds = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_initialized() else [])]
    backends = []
    for kind in kinds:
        with suppress(RuntimeError):  # the group has no backend for this kind of device
            backends.append(group._get_backend(kind))  # type: ignore[attr-defined]
    return sum(backend._get_sequence_number_for_group() for backend in backends)


def heartbeat_of_this_rank() -> RankHeartbeat:
    """Return the heartbeat of the process that the launcher started as a rank."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return RankHeartbeat(Path(folder) if folder else None, int(os.environ.get("LOCAL_RANK", "0")))


def write_stacks_on_signal() -> None:
    """Write the Python stacks of all threads to a file when SIGUSR2 arrives. Call it in ranks and engine processes."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        file = stacks_file(Path(folder), os.getpid()).open("w", encoding="utf-8")
        faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)


def stacks_file(folder: Path, pid: int) -> Path:
    """Return the file for the stacks of a process."""
    return folder / "stacks" / str(pid)

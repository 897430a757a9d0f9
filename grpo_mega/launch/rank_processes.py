"""The processes of the ranks of one machine: their start, their stderr, signals to them, and their exits.

Asserted by tests/unit/launch/test_main.py.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from grpo_mega.launch import processes
from grpo_mega.parallel.stop_signal import STOP_SIGNAL, take_stop

_GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL: a rank may be writing its last log line
_SECOND_SIGNAL_SECONDS = 1.0  # between the first and the second SIGTERM
_POLL_SECONDS = 0.2  # a signal that arrives just before a blocking wait is handled only after the wait
_TAIL_LINES = 40  # of each rank's stderr, kept to be printed again after a failure
_PR_SET_PDEATHSIG = 1  # prctl(2)


def _die_with_parent() -> None:
    """Have the kernel kill this child when its parent exits, even by SIGKILL. Runs in the child before exec."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _StderrForwarder:
    """Forwards each rank's stderr line by line, counts the lines, and records which rank wrote last."""

    def __init__(self, num_ranks: int) -> None:
        self.tails: list[deque[bytes]] = [deque(maxlen=_TAIL_LINES) for _ in range(num_ranks)]
        self.last_writer = -1
        self.num_lines = 0
        """Lines of all ranks so far."""
        self._lock = threading.Lock()

    def forward(self, local_rank: int, descriptor: int) -> None:
        """Forward lines until the pipe closes. A carriage return also ends a line: progress bars use it."""
        rest = b""
        while chunk := os.read(descriptor, 65536):
            *lines, rest = (rest + chunk).replace(b"\r", b"\r\n").split(b"\n")
            self._write(local_rank, lines)
        self._write(local_rank, [rest] if rest else [])

    def _write(self, local_rank: int, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        with self._lock:
            self.tails[local_rank].extend(lines)
            self.last_writer = local_rank
            self.num_lines += len(lines)
            # A line that ends with a carriage return gets no newline: the next line overwrites it.
            sys.stderr.buffer.write(b"".join(line if line.endswith(b"\r") else line + b"\n" for line in lines))
            sys.stderr.buffer.flush()


@dataclass(frozen=True)
class RankExit:
    """Exit of a rank of this machine with `code`; or, if `rank` is None, a failure of the job.

    `is_stall`: the launchers have found that the job has stalled; otherwise the failure is on another machine.
    """

    rank: int | None
    code: int
    text: str = ""
    is_stall: bool = False


class RankProcesses:
    """The processes of this machine's ranks. Each leads a process group that also holds its children."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self.names = [env["RANK"] for env in environments]
        self.screen = _StderrForwarder(len(environments))
        self.exits: queue.SimpleQueue[RankExit] = queue.SimpleQueue()  # as they happen
        self.processes = [
            subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,  # a group that is not in the terminal's foreground is stopped when it reads
                stderr=subprocess.PIPE,
                process_group=0,
                preexec_fn=_die_with_parent,
            )
            for env in environments
        ]
        self.readers = [self._thread(self._read, rank) for rank in range(len(self.processes))]
        for rank in range(len(self.processes)):
            self._thread(self._wait, rank)

    @staticmethod
    def _thread(target: Callable[[int], None], rank: int) -> threading.Thread:
        thread = threading.Thread(target=target, args=(rank,), daemon=True)
        thread.start()
        return thread

    def _read(self, rank: int) -> None:
        pipe = self.processes[rank].stderr
        assert pipe is not None
        self.screen.forward(rank, pipe.fileno())

    def _wait(self, rank: int) -> None:
        self.exits.put(RankExit(rank, self.processes[rank].wait()))

    def next_exit(self, seconds: float | None, find_stall: Callable[[], str | None]) -> RankExit | None:
        """Wait for the next exit, at most `seconds`. Meanwhile, forward a stop request to the ranks, but not to their
        children, and look for a stall. Return None if no rank exits in that time."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while deadline is None or time.monotonic() < deadline:
            if take_stop():
                self.request(STOP_SIGNAL)
            if self.exits.empty() and (report := find_stall()) is not None:
                return RankExit(None, 1, report, is_stall=True)
            with suppress(queue.Empty):
                return self.exits.get(timeout=_POLL_SECONDS)
        return None

    def request(self, number: int) -> None:
        """Send a signal to every rank that is still running, but not to its children."""
        for process in self.processes:
            if process.returncode is None:
                process.send_signal(number)

    def send(self, number: int) -> None:
        """Send a signal to every rank that is still running, and to its children."""
        for process in self.processes:
            if process.returncode is None:
                _signal_group(process.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM, once more after a second, and SIGKILL to the processes that are still running after 10 s.

        The first one is a request to a rank that trains, the second one ends it. A stopped rank is killed at once.
        """
        for process in self.processes:
            if process.returncode is None and processes.state(process.pid) in "Tt":
                _signal_group(process.pid, signal.SIGKILL)
        for seconds in (_SECOND_SIGNAL_SECONDS, _GRACE_SECONDS):
            self.send(signal.SIGTERM)
            deadline = time.monotonic() + seconds
            while any(process.returncode is None for process in self.processes) and time.monotonic() < deadline:
                time.sleep(0.02)
        self.kill()

    def kill(self) -> None:
        """Kill all ranks and their children, and read the rest of their stderr."""
        for process in self.processes:
            _signal_group(process.pid, signal.SIGKILL)
        for reader in self.readers:
            reader.join(timeout=1.0)


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return

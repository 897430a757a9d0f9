"""Watches the ranks of one machine: starts them, passes signals on, ends all when one fails, says which one it was.

torchrun is not used for this: it answers every failure with exit code 1 and a traceback of its own, and its
TORCHELASTIC_* variables make an engine's child processes wait for a store that nobody hosts. Invariants, each with a
test in tests/unit/launch/test_main.py: the exit code is the first failing rank's, also where that is on another
machine; that rank's last lines end the screen; no rank outlives this process; a wish to stop
(grpo_mega/parallel/stop_signal.py) reaches every rank and ends none.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from grpo_mega.launch.rendezvous import Rendezvous
from grpo_mega.parallel.stop_signal import EXIT_CODE, STOP_SIGNAL, expect_stop, take_stop

_GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL: a rank may be writing its last log line
_LISTEN_SECONDS = 0.2  # a signal that comes just before a blocking wait is handled only when the wait ends
_TAIL_LINES = 40  # of a rank's stderr, kept to be shown again
_MAX_TAIL_CHARACTERS = 20000  # of what other machines are told
_PR_SET_PDEATHSIG = 1  # prctl(2)


def _die_with_parent() -> None:
    """Runs in the child before exec: the kernel ends it when the agent is gone, even by SIGKILL."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Screen:
    """Forwards each rank's stderr line by line and knows who wrote last."""

    def __init__(self, num_ranks: int) -> None:
        self.tails: list[deque[bytes]] = [deque(maxlen=_TAIL_LINES) for _ in range(num_ranks)]
        self.last_writer = -1
        self._lock = threading.Lock()

    def forward(self, local_rank: int, descriptor: int) -> None:
        """Until the pipe closes. A carriage return ends a line too: progress bars have no other."""
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
            # A line that ended with a carriage return keeps it and gets no newline: the next one overwrites it.
            sys.stderr.buffer.write(b"".join(line if line.endswith(b"\r") else line + b"\n" for line in lines))
            sys.stderr.buffer.flush()


@dataclass(frozen=True)
class _End:
    """A rank of this machine has ended with `code`; or, where `rank` is None, the job has failed elsewhere."""

    rank: int | None
    code: int
    text: str = ""


class _Ranks:
    """The processes of this machine's ranks. Each leads a process group, which holds its own children too."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self.names = [env["RANK"] for env in environments]
        self.screen = _Screen(len(environments))
        self.ends: queue.SimpleQueue[_End] = queue.SimpleQueue()  # as they happen
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
        self.ends.put(_End(rank, self.processes[rank].wait()))

    def next_end(self) -> _End:
        """The next rank that ends; meanwhile a wish to stop is passed on to the ranks, not to their children."""
        while True:
            if take_stop():
                for process in self.processes:
                    if process.returncode is None:
                        process.send_signal(STOP_SIGNAL)
            with suppress(queue.Empty):
                return self.ends.get(timeout=_LISTEN_SECONDS)

    def send(self, number: int) -> None:
        """A signal to every rank that still runs, and to its children."""
        for process in self.processes:
            if process.returncode is None:
                _signal_group(process.pid, number)

    def end(self) -> None:
        """SIGTERM, then SIGKILL to what is left of every process group."""
        self.send(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        while any(process.returncode is None for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in self.processes:
            _signal_group(process.pid, signal.SIGKILL)
        for reader in self.readers:
            reader.join(timeout=1.0)


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def exit_code_of(return_code: int) -> int:
    """2 stays 2 (the user's input), 130 an interruption; everything else is 1: a failure of ours or of the machine."""
    return return_code if return_code in (0, 2, 130) else 1


def _report(ranks: _Ranks, failed: int, return_code: int) -> str:
    """Makes the failed rank's own message the last thing on the screen; returns it for the other machines."""
    tail = [line.decode(errors="replace") for line in ranks.screen.tails[failed]]
    cause: list[str] = []
    if return_code < 0:
        name = signal.Signals(-return_code).name
        usual = " (the usual cause: out of memory)" if return_code == -signal.SIGKILL else ""
        cause.append(f"launch: rank {ranks.names[failed]} was ended by {name}{usual}")
    elif not tail:
        cause.append(f"launch: rank {ranks.names[failed]} ended with exit code {return_code} and no message")
    shown = cause
    if ranks.screen.last_writer != failed and tail:
        shown = [f"launch: the last lines of rank {ranks.names[failed]}, which failed first:", *tail, *cause]
    _show("".join(f"{line}\n" for line in shown))
    heading = f"launch: the last lines of rank {ranks.names[failed]} on {socket.gethostname()}, which failed first:"
    return "".join(f"{line}\n" for line in [heading, *tail, *cause])[-_MAX_TAIL_CHARACTERS:]


def _show(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def run_ranks(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], meeting: Rendezvous | None = None
) -> int:
    """Runs `command` once per environment and waits for all; the first that fails ends the others.

    Args:
        command: of a rank.
        environments: one for each rank of this machine.
        meeting: with the agents of the other machines, where there are any: what fails there ends the ranks here.

    Returns:
        0 when every rank returned 0, 130 after a signal or a wish to stop, else that of the rank that failed first
        (`exit_code_of`).
    """
    received: list[int] = []
    ranks: _Ranks | None = None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if ranks is not None:
            # A rank that waits inside a collective hears nothing else: the second Ctrl-C means it.
            ranks.send(number if len(received) == 1 else signal.SIGKILL)

    expect_stop()
    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        ranks = _Ranks(command, environments)
        if received:  # while they were started
            ranks.send(received[0])
        if meeting is not None:
            meeting.watch(lambda code, text: ranks.ends.put(_End(None, code, text)))
        return _wait_for_all(ranks, received, meeting)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_for_all(ranks: _Ranks, received: Sequence[int], meeting: Rendezvous | None) -> int:
    stopped = False
    for _ in ranks.processes:
        end = ranks.next_end()
        if end.rank is None:
            ranks.end()
            _show(end.text)
            return end.code
        if end.code == EXIT_CODE:  # all ranks have agreed on it: the others are about to end, too
            stopped = True
        elif end.code != 0:
            ranks.readers[end.rank].join(timeout=0.5)  # its last lines before those of ranks that it takes along
            ranks.end()
            code = 130 if received else exit_code_of(end.code)
            text = f"launch: interrupted on {socket.gethostname()}\n"
            if not received:
                text = _report(ranks, end.rank, end.code)
            if meeting is not None:
                meeting.tell(code, text)
            return code
    for reader in ranks.readers:
        reader.join(timeout=1.0)
    return EXIT_CODE if stopped else 0

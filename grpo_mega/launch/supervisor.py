"""Supervise the ranks of one machine: start them, forward signals, and end all when one fails.

torchrun is not used: it turns every failure into exit code 1 with its own traceback, and its TORCHELASTIC_* variables
make an engine's child processes wait for a store that does not exist. Invariants, each with a test in
tests/unit/launch/test_main.py: the exit code is that of the rank that failed first, even on another machine; the last
lines of that rank are the last ones on the screen; no rank outlives this process; a stop request
(grpo_mega/parallel/stop_signal.py) is forwarded to every rank and ends none, and a second Ctrl-C ends all at once.
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
from grpo_mega.launch.run_temporaries import run_environment, run_temporaries
from grpo_mega.parallel.stop_signal import (
    EXIT_CODE,
    STOP_SIGNAL,
    STOPPED_EXIT_CODES,
    TERMINATED_EXIT_CODE,
    expect_stop,
    take_stop,
)

_GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL: a rank may be writing its last log line
_SECOND_SIGNAL_SECONDS = 1.0  # between the first and the second SIGTERM
_STOPPING_SECONDS = 60.0  # from the first rank that exits after a stop request to the last one
_POLL_SECONDS = 0.2  # a signal that arrives just before a blocking wait is handled only after the wait
_REASON_SECONDS = 5.0  # from the exit of a rank without a message to the message of another rank
_TAIL_LINES = 40  # of each rank's stderr, kept to be printed again after a failure
_MAX_TAIL_CHARACTERS = 20000  # of the text that is sent to other machines
_PR_SET_PDEATHSIG = 1  # prctl(2)


def _die_with_parent() -> None:
    """Have the kernel kill this child when its parent exits, even by SIGKILL. Runs in the child before exec."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _StderrForwarder:
    """Forwards each rank's stderr line by line and records which rank wrote last."""

    def __init__(self, num_ranks: int) -> None:
        self.tails: list[deque[bytes]] = [deque(maxlen=_TAIL_LINES) for _ in range(num_ranks)]
        self.last_writer = -1
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
            # A line that ends with a carriage return gets no newline: the next line overwrites it.
            sys.stderr.buffer.write(b"".join(line if line.endswith(b"\r") else line + b"\n" for line in lines))
            sys.stderr.buffer.flush()


@dataclass(frozen=True)
class _RankExit:
    """Exit of a rank of this machine with `code`; or, if `rank` is None, a failure on another machine."""

    rank: int | None
    code: int
    text: str = ""


class _Ranks:
    """The processes of this machine's ranks. Each leads a process group that also holds its children."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self.names = [env["RANK"] for env in environments]
        self.screen = _StderrForwarder(len(environments))
        self.exits: queue.SimpleQueue[_RankExit] = queue.SimpleQueue()  # as they happen
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
        self.exits.put(_RankExit(rank, self.processes[rank].wait()))

    def next_exit(self, seconds: float | None) -> _RankExit | None:
        """Wait for the next exit, at most `seconds`. Meanwhile, forward a stop request to the ranks, but not to their
        children. Return None if no rank exits in that time."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while deadline is None or time.monotonic() < deadline:
            if take_stop():
                self.request(STOP_SIGNAL)
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

        The first one is a request to a rank that trains, the second one ends it.
        """
        for seconds in (_SECOND_SIGNAL_SECONDS, _GRACE_SECONDS):
            self.send(signal.SIGTERM)
            deadline = time.monotonic() + seconds
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
    """Map a return code to an exit code: 0, 2 (wrong input), 130 and 143 (stopped) stay; all others become 1."""
    return return_code if return_code in (0, 2, *STOPPED_EXIT_CODES) else 1


def _report(ranks: _Ranks, failed: int, return_code: int) -> str:
    """Print the failed rank's last lines as the last text on the screen. Return them for the other machines."""
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


def _show_reason(ranks: _Ranks, reason: _RankExit) -> str:
    """Print the reason of a failure as the last text on the screen. Return it for the other machines."""
    if reason.rank is not None:
        return _report(ranks, reason.rank, reason.code)
    _show(reason.text)
    return reason.text


def _exit_with_reason(ranks: _Ranks, first: _RankExit) -> _RankExit:
    """Return the exit whose rank wrote the reason of the failure: `first`, or the next exit with a message.

    A rank that exits without a message leaves the message to another rank that has the same error. If no rank here
    writes one within 5 s, and no other machine reports a failure, the result is `first`.
    """
    exited, deadline = first, time.monotonic() + _REASON_SECONDS
    while exited.rank is not None:
        ranks.readers[exited.rank].join(timeout=0.5)  # before the lines of the ranks that it makes fail
        if exited.code < 0 or (exited.code not in (0, *STOPPED_EXIT_CODES) and ranks.screen.tails[exited.rank]):
            return exited
        try:
            exited = ranks.exits.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return first
    return exited


def _show(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def run_ranks(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], meeting: Rendezvous | None = None
) -> int:
    """Run `command` once per environment and wait for all ranks. The first failure ends the others.

    Args:
        command: that starts a rank.
        environments: one per rank of this machine.
        meeting: rendezvous with the other machines, if any; a failure there ends the ranks of this machine.

    Returns:
        0 if every rank returned 0; after a stop request 143 for SIGTERM and 130 for all others; else the exit code of
        the rank that failed first (`exit_code_of`).
    """
    received: list[int] = []
    ranks: _Ranks | None = None

    def forward_signal(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if ranks is not None:
            if len(received) == 1:
                ranks.request(_request_of(number))
            else:
                ranks.send(signal.SIGKILL)

    expect_stop()
    previous = {
        number: signal.signal(number, forward_signal) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        with run_temporaries() as folder:
            ranks = _Ranks(command, [{**env, **run_environment(folder)} for env in environments])
            if received:  # while the ranks were started
                ranks.request(_request_of(received[0]))
            if meeting is not None:
                meeting.watch(lambda code, text: ranks.exits.put(_RankExit(None, code, text)))
            return _wait_for_all(ranks, received, meeting)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_for_all(ranks: _Ranks, received: Sequence[int], meeting: Rendezvous | None) -> int:
    stopped = 0
    for _ in ranks.processes:
        exited = ranks.next_exit(_STOPPING_SECONDS if stopped else None)
        if exited is None:  # the first ranks had left before training started, and the others wait for them
            ranks.terminate()
            break
        if exited.rank is None:
            ranks.terminate()
            _show(exited.text)
            return exited.code
        if exited.code in STOPPED_EXIT_CODES:  # all ranks agreed to stop: the others exit soon
            stopped = max(stopped, exited.code)
        elif exited.code != 0:
            by_signal = len(received) > 1 or (received and -exited.code == _request_of(received[0]))
            reason = exited if by_signal else _exit_with_reason(ranks, exited)
            ranks.terminate()
            code = _stopped_code(received) if by_signal else exit_code_of(exited.code)
            text = f"launch: interrupted on {socket.gethostname()}\n"
            if by_signal:
                _show(text)
            else:
                text = _show_reason(ranks, reason)
            if meeting is not None:
                meeting.report_failure(code, text)
            return code
    for reader in ranks.readers:
        reader.join(timeout=1.0)
    return _stopped_code(received) if stopped and received else stopped


def _request_of(number: int) -> int:
    """Return the signal for the ranks: a closed terminal (SIGHUP) is a request to terminate."""
    return signal.SIGTERM if number == signal.SIGHUP else number


def _stopped_code(received: Sequence[int]) -> int:
    return EXIT_CODE if _request_of(received[0]) == signal.SIGINT else TERMINATED_EXIT_CODE

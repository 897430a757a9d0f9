"""Stop requests of the user or the scheduler: SIGINT (Ctrl-C), SIGTERM and SIGUSR1.

Before training starts, SIGINT and SIGTERM end the process at once. While a run trains they are requests, as SIGUSR1
always is (Slurm sends it a few minutes before a job's time limit, launch/slurm.sbatch): the training loop checks for
them, saves, and the process exits. The second SIGINT or SIGTERM ends it at once, also while it waits in a collective.

SIGUSR1 is blocked in every process from its start. Children inherit the blocked signal, so it does not end reward
workers and engines as its default action would. SIGINT and SIGTERM are not blocked, so children keep their default
actions. Imports no torch at the top, because the launcher forwards stop requests without it.
Tests: tests/unit/parallel/test_stop_signal.py, tests/e2e/test_resume.py.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_mega.parallel.ranks import Ranks

STOP_SIGNAL = signal.SIGUSR1
EXIT_CODE = 130
"""Exit code of a run that SIGINT or SIGUSR1 stopped; the same command continues it."""
TERMINATED_EXIT_CODE = 143
"""Exit code of a run that SIGTERM stopped; the same command continues it."""
STOPPED_EXIT_CODES = (EXIT_CODE, TERMINATED_EXIT_CODE)
_LEAVE_SECONDS = 10.0  # from a signal before training to the end of a process whose main thread waits in a library


class Stopped(Exception):  # noqa: N818 - it is not an error
    """The run stopped because of a stop request; its newest checkpoint is complete. `code`: of the process's exit."""

    def __init__(self, message: str, code: int = EXIT_CODE) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(BaseException):
    """SIGINT or SIGTERM ended the process before it trained. `code`: of its exit."""

    def __init__(self, code: int) -> None:
        super().__init__(f"interrupted before this command trained; it can be repeated (exit code {code})")
        self.code = code


class StopRequests:
    """The stop requests that this process has received. One object per process, created by its main thread."""

    def __init__(self, end_process: Callable[[int], None] = os._exit) -> None:
        """Install the handlers. `end_process` ends this process at once with an exit code."""
        self._end_process = end_process
        self._received: list[int] = []
        self._is_training = False
        expect_stop()
        # The kernel writes each signal's number into the pipe although the main thread waits in a library.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True, name="stop requests").start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def training_starts(self) -> None:
        """From now on, the first SIGINT or SIGTERM is a request."""
        self._is_training = True

    def wanted(self) -> int:
        """Return the exit code of the request that this process has received, or 0."""
        if signal.SIGTERM in self._received:
            return TERMINATED_EXIT_CODE
        return EXIT_CODE if self._received or STOP_SIGNAL in signal.sigpending() else 0

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self._is_training:
            raise Interrupted(_code_of(number))

    def _watch(self, reading: int) -> None:
        while True:
            for number in os.read(reading, 64):
                if number in (signal.SIGINT, signal.SIGTERM):
                    self._received.append(number)
                    if len(self._received) > 1:
                        self._end_process(_code_of(number))
                    elif not self._is_training:
                        late = threading.Timer(_LEAVE_SECONDS, self._end_process, [_code_of(number)])
                        late.daemon = True
                        late.start()
                    elif os.environ.get("RANK", "0") == "0":
                        sys.stderr.write(
                            f"{signal.Signals(number).name}: stopping at the next point where the run can be saved;"
                            " once more ends it at once\n"
                        )


def _code_of(number: int) -> int:
    return TERMINATED_EXIT_CODE if number == signal.SIGTERM else EXIT_CODE


def expect_stop() -> None:
    """Block SIGUSR1 until it is checked. Call before other threads and processes are started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL})


def take_stop() -> bool:
    """Return True if SIGUSR1 arrived since the last call."""
    if STOP_SIGNAL not in signal.sigpending():
        return False
    signal.sigwait({STOP_SIGNAL})
    return True


def largest_on_all(values: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
    """Return the largest of each value over all ranks. Collective."""
    if ranks.topology.world_size == 1:
        return values
    import torch
    import torch.distributed as dist

    found = torch.tensor(values)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return tuple(int(value) for value in found)

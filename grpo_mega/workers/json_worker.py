"""The parent's side of one worker process: start it, exchange lines of JSON with it, end it.

A worker is a new program (`python -m MODULE`), not a fork. It inherits no torch, no sockets of a process group, no
engine state and no GPU, and none of the variables that make a process a rank. It leads its own session, so that every
process which it starts is killed with it.

The first line that the parent sends is the setup. The worker answers it with `{"ready": true}` or `{"error": "..."}`.
Every later line is a job or an answer, in the format of the module. The child's side is `worker_main.py`.

A user's function runs in the process that holds the connection, and may write to it. A worker whose connection brings
anything but messages of its module has failed: the parent kills it, as if it had crashed.

Asserted by tests/unit/workers/test_json_worker.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from grpo_mega.workers.worker_output import log_output

START_SECONDS = 120.0
"""Limit for a worker to start and to import what it runs."""
GRACE_SECONDS = 1.0
"""Time past the limit of a job before the parent kills the worker; the worker's own alarm normally ends it first."""
_KILL_SECONDS = 10.0
_PIECE_BYTES = 1 << 16
_MAX_PIECES = 256  # of one read, so that a worker that never stops writing does not hold up the others
_MAX_MESSAGE_BYTES = 1 << 28
_SHOWN_CHARACTERS = 100  # of something that is not a message
_OUTPUT_SECONDS = 1.0  # for the last lines of a worker that has exited
_EXIT_SECONDS = 1.0  # from the end of the connection to the exit of the process

_DROPPED_PREFIXES = ("CUDA_", "GLOO_", "LOCAL_", "MASTER_", "NCCL_", "PMI", "ROLE_", "SLURM_", "TORCH", "VLLM_")
_DROPPED = frozenset(("RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "LD_PRELOAD", "OMPI_COMM_WORLD_RANK"))


class WorkerExitedError(RuntimeError):
    """The worker process exited before it answered, or was killed because it sent something that is not a message.

    `status` is its exit status, negative for a signal; `reason` says what ended it.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"the worker process exited, {reason}")
        self.status, self.reason = status, reason


class JsonWorker:
    """One worker process and the connection to it. Only `wait_...`, `kill` and `exited` block.

    A caller that serves several workers watches `connection`: always for reading, and for writing while there is a
    `backlog` of bytes that the socket did not take yet.

    Args:
        module: the module that the worker runs; it calls `worker_main.serve`.
        setup: the first message, serializable as JSON.
    """

    def __init__(self, module: str, setup: object) -> None:
        self.connection, child_end = socket.socketpair()
        with child_end:
            self._process = _start(module, child_end)
        assert self._process.stdout is not None, "the worker was started with a pipe"
        kind = module.rpartition(".")[0].rpartition(".")[2]
        self._output = log_output(self._process.stdout, f"{kind} worker {self._process.pid}")
        self.connection.setblocking(False)
        self.pid = self._process.pid
        self.is_alive = True
        self.is_ready = False
        self.setup_error: str | None = None
        self.started = self.last_progress = time.monotonic()
        self.backlog = bytearray()
        self.invalid_message: str | None = None
        """What arrived instead of a message; `exited` kills the worker then."""
        self._incoming: list[bytes] = []  # of a line whose end has not arrived
        self._incoming_bytes = 0
        self.send(setup)

    def send(self, message: object) -> None:
        """Queue one message and write as much of it as the socket takes."""
        self.backlog += json.dumps(message).encode("ascii") + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write as much of the backlog as the socket takes."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self.backlog:
                del self.backlog[: self.connection.send(self.backlog)]
                self.last_progress = time.monotonic()  # the worker's clock starts only when it has the whole job

    def receive(self) -> tuple[list[Any], bool]:
        """Return the messages that have arrived, and whether the worker can send more.

        It cannot after it has closed the connection or sent a line that is not JSON (`invalid_message`). The answer to
        the setup is not returned: it sets `is_ready` or `setup_error`.
        """
        lines, is_open = self._read_lines()
        messages: list[Any] = []
        for line in lines:
            self.last_progress = time.monotonic()
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                self.reject(line)
                return messages, False
            if self.is_ready:
                messages.append(message)
            elif isinstance(message, dict) and ("ready" in message or isinstance(message.get("error"), str)):
                self.is_ready, self.setup_error = "ready" in message, message.get("error")
            else:
                self.reject(message)
                return messages, False
        return messages, is_open

    def reject(self, message: object) -> None:
        """Record that `message` is not in the format of the module; the first one is kept."""
        if self.invalid_message is None:
            shown = repr(message)
            cut = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."
            self.invalid_message = f"its connection, to which only grpo_mega may write, contained {cut}"

    def _read_lines(self) -> tuple[list[bytes], bool]:
        """Return the complete lines that have arrived, and whether the connection is still open.

        Each byte is copied a fixed number of times, however many reads an incomplete line takes.
        """
        lines: list[bytes] = []
        try:
            for _ in range(_MAX_PIECES):
                piece = self.connection.recv(_PIECE_BYTES)
                if not piece:
                    return lines, False
                end_of_lines, newline, rest = piece.rpartition(b"\n")
                if newline:
                    lines += b"".join((*self._incoming, end_of_lines)).split(b"\n")
                    self._incoming, self._incoming_bytes = [], 0
                if rest:
                    self._incoming.append(rest)
                    self._incoming_bytes += len(rest)
        except BlockingIOError:
            pass
        except ConnectionResetError:
            return lines, False
        if self._incoming_bytes > _MAX_MESSAGE_BYTES:
            self.reject(self._incoming[0])
            return lines, False
        return lines, True

    def is_late(self, seconds: float) -> bool:
        """Return True when no byte has moved for `seconds` and the grace after them."""
        return time.monotonic() - self.last_progress > seconds + GRACE_SECONDS

    def wait_until_ready(self) -> None:
        """Wait for the answer to the setup.

        Raises:
            RuntimeError: the worker reported an error, exited, or was not ready within START_SECONDS.
        """
        while not self.is_ready:
            remaining = self.started + START_SECONDS - time.monotonic()
            if remaining <= 0:
                raise RuntimeError(f"a worker process was not ready within {START_SECONDS:g} s")
            self._poll(remaining)
            _, is_open = self.receive()
            if self.setup_error is not None:
                raise RuntimeError(self.setup_error)
            if not is_open and not self.is_ready:
                raise self.exited()

    def wait_for_message(self, seconds: float) -> Any:
        """Return the next message.

        Raises:
            TimeoutError: no byte has moved for `seconds` and the grace after them; the worker is still running.
            WorkerExitedError: the worker exited first, or sent something that is not a message.
        """
        while not self.is_late(seconds):
            self._poll(self.last_progress + seconds + GRACE_SECONDS - time.monotonic())
            messages, is_open = self.receive()
            if messages:
                return messages[0]
            if not is_open:
                raise self.exited()
        raise TimeoutError(f"no message within {seconds:g} s")

    def kill(self) -> int:
        """Kill the worker and every process that it started; return the exit status, negative for a signal."""
        self.is_alive = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.connection.close()
        try:
            status = self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:  # blocked inside a system call; the kernel ends it when the call returns
            return -signal.SIGKILL
        self._output.join(_OUTPUT_SECONDS)
        return status

    def is_stopped(self) -> bool:
        """Return True if SIGSTOP or a debugger has stopped the process; on other systems than Linux always False."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in "Tt"

    def exited(self) -> WorkerExitedError:
        """End a worker that cannot send more: wait for its exit if it closed its connection, kill what is left of it.

        Returns:
            The exit status and the reason of the end, for the caller to raise or to report.
        """
        if self.invalid_message is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_SECONDS)
        status = self.kill()
        return WorkerExitedError(status, self.invalid_message or f"exit status {status}")

    def _poll(self, seconds: float) -> None:
        """Wait until a message arrives, or the socket takes more of the backlog, or the time is over."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN | (select.POLLOUT if self.backlog else 0))
        poll.poll(max(0.0, seconds) * 1000)
        self.flush()


def clean_environment() -> dict[str, str]:
    """Return the environment variables without those of ranks, launchers and devices; PYTHONPATH holds `sys.path`."""
    kept = {k: v for k, v in os.environ.items() if k not in _DROPPED and not k.startswith(_DROPPED_PREFIXES)}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return kept | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _start(module: str, connection: socket.socket) -> subprocess.Popen[bytes]:
    """Run `python -m MODULE DESCRIPTOR PARENT_PID` in its own session.

    What it prints goes to the log of this process (worker_output.py), so that it cannot disturb a live display.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(connection.fileno()), str(os.getpid())],
        pass_fds=(connection.fileno(),),
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

"""Starts one SGLang process and communicates with it. Every wait has a timeout; errors include the end of the log.

Asserted by tests/unit/engines/sglang/test_engine_client.py and tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from grpo_mega.engines.sglang.arguments import process_environment
from grpo_mega.engines.sglang.messages import HostSettings, set_timeouts

_HOST_MODULE = "grpo_mega.engines.sglang.engine_process"
_START_SECONDS = 600.0  # for imports and spawned processes, on a machine that several engines share
_END_SECONDS = 20.0
_CHECK_SECONDS = 1.0  # between two looks for a stopped process while a command runs
_STOPPED_SECONDS = 30.0  # less than the launcher waits before it ends a job with a stopped process
_TITLE_SECONDS = 60.0  # after the start, within which SGLang's processes set their titles
_LAST_LINES = 30  # lines of the log in an error


class SglangProcess:
    """A child process that runs sglang/engine_process.py; its output goes to `log`."""

    def __init__(
        self,
        arguments: dict[str, Any],
        *,
        tp: int,
        log: Path | None,
        timeout_seconds: float,
        gpus: Sequence[str] | None = None,
    ) -> None:
        """Start the process without waiting for it; `started` waits.

        Args:
            arguments: keyword arguments of SGLang's Engine.
            tp: number of ranks of the engine.
            log: file for the output; None: a temporary file.
            timeout_seconds: limit for every answer except sampling.
            gpus: GPUs of the ranks, as CUDA_VISIBLE_DEVICES names them; None without CUDA.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="grpo_mega_sglang_"))
        self._log = log or self._folder / "sglang.log"
        self._timeout = timeout_seconds
        ours, theirs = socket.socketpair()
        set_timeouts(ours, timeout_seconds)
        with theirs, self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _HOST_MODULE, str(theirs.fileno())],
                env=process_environment(os.environ, self._folder, tp, gpus),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # signals from the terminal are for the ranks only
            )
        self._connection = Connection(ours.detach())
        self._answer_pending = True  # at first the answer to the start
        self._stopped_since: float | None = None
        self._has_started, self._start_time = False, math.inf
        self._children: dict[int, psutil.Process] = {}  # schedulers and detokenizer, by process id
        # half of the timeout: the process reports schedulers that do not become idle before this client gives up
        self._send(HostSettings(arguments, self._folder, tp, idle_seconds=timeout_seconds / 2))

    @property
    def pid(self) -> int:
        return self._process.pid

    def started(self, beat_seconds: float) -> Iterator[None]:
        """Yield None every `beat_seconds` until the engine has started.

        Raises:
            RuntimeError: it did not start (with the end of its log).
        """
        for _ in self._parts("start", _START_SECONDS, beat_seconds):
            yield None
        self._has_started, self._start_time = True, time.monotonic()
        self._find_children()

    def call(self, command: str, *arguments: Any) -> Any:
        """Run one command in the process and return its answer.

        Raises:
            RuntimeError: the command failed, timed out, or the process exited or has been stopped (with the end of its
                log).
        """
        self._finish_last()
        self._answer_pending = True
        self._send((command, arguments))
        answer = None
        for part in self._parts(command, self._timeout, _CHECK_SECONDS):
            answer = part
        return answer

    def stream(self, command: str, *arguments: Any, beat_seconds: float) -> Iterator[Any]:
        """Run one command and yield its results as they arrive, and None every `beat_seconds` without one.

        There is no timeout while the process is running.

        Raises:
            RuntimeError: as `call`.
        """
        self._finish_last()
        self._answer_pending = True
        self._send((command, arguments))
        yield from self._parts(command, None, beat_seconds)

    @property
    def has_exited(self) -> bool:
        """True if the process is not running any more."""
        return self._process.poll() is not None

    def fault(self) -> str:
        """Return why the process cannot be used any more, or an empty string. Does not wait."""
        if self.has_exited:
            return f"SGLang's process {self.pid} exited with code {self._process.poll()}{self.last_words()}"
        if (exited := self._exited_child()) is not None:
            return f"SGLang's process {exited} exited{self.last_words()}"
        stopped = self._stopped()
        return "" if stopped is None else f"SGLang's process {stopped} is stopped (SIGSTOP, or a debugger)"

    def close(self) -> None:
        """End the process and its children. A second call does nothing."""
        if self._connection.closed:
            return
        self._has_started = False  # from now on its processes are expected to exit
        with suppress(RuntimeError):
            self._timeout = min(self._timeout, _END_SECONDS)
            self.call("end")
        self._kill()
        self._connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _finish_last(self) -> None:
        """Read the rest of the previous answer, if its caller stopped in the middle of a stream."""
        if self._answer_pending:
            for _ in self._parts("the rest of the last request", None, self._timeout):
                pass

    def _parts(self, command: str, limit: float | None, beat_seconds: float) -> Iterator[Any]:
        """Yield the parts of an answer, None at each heartbeat, and at last the value of `done` unless it is None."""
        now = time.monotonic()
        end, next_beat = math.inf if limit is None else now + limit, now + beat_seconds
        while True:
            now = time.monotonic()
            if now >= end:
                raise self._timed_out(f"answer {command}", limit)
            if not self._connection.poll(max(0.0, min(_CHECK_SECONDS, end - now, next_beat - now))):
                self._require_running(command)
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + beat_seconds
                    yield None
                continue
            kind, value = self._receive(command)
            next_beat = time.monotonic() + beat_seconds
            if kind == "done":
                self._answer_pending = False
                if value is not None:
                    yield value
                return
            if kind == "failed":
                self._answer_pending = False
                raise RuntimeError(f"SGLang: {value}{self.last_words()}")
            yield value

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return  # the next read reports the exit
        except BlockingIOError as error:
            raise self._timed_out("accept a message") from error

    def _receive(self, command: str) -> tuple[str, Any]:
        try:
            answer: tuple[str, Any] = self._connection.recv()
        except BlockingIOError as error:
            raise self._timed_out(f"complete its answer to {command}") from error
        except (EOFError, ConnectionResetError, BrokenPipeError) as error:
            self._kill()
            raise RuntimeError(
                f"SGLang's process {self.pid} exited with code {self._process.returncode} during {command}"
                f"{self.last_words()}"
            ) from error
        return answer

    def _timed_out(self, what: str, limit: float | None = None) -> RuntimeError:
        """Kill the process and return the error to raise."""
        self._kill()
        return RuntimeError(f"SGLang did not {what} within {limit or self._timeout:g} s{self.last_words()}")

    def _require_running(self, command: str) -> None:
        """Kill the process and raise RuntimeError if a child has exited, or if one or it has been stopped too long."""
        if (exited := self._exited_child()) is not None:
            self._kill()
            raise RuntimeError(f"SGLang's process {exited} exited during {command}{self.last_words()}")
        stopped = self._stopped()
        if stopped is None:
            self._stopped_since = None
            return
        now = time.monotonic()
        self._stopped_since = self._stopped_since or now
        if now - self._stopped_since < _STOPPED_SECONDS:
            return
        self._kill()
        raise RuntimeError(
            f"SGLang's process {stopped} has been stopped (SIGSTOP, or a debugger) for {_STOPPED_SECONDS:g} s during "
            f"{command}{self.last_words()}"
        )

    def _exited_child(self) -> int | None:
        """Return the first process that SGLang started and that has exited: a scheduler or the detokenizer.

        SGLang notices it too, but the signal by which it ends itself is lost while its event loop does not run, which
        is the case between two commands.
        """
        if not self._has_started:
            return None
        if time.monotonic() - self._start_time < _TITLE_SECONDS:
            self._find_children()
        for child in self._children.values():
            with suppress(psutil.NoSuchProcess):
                if child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
                    continue
            return int(child.pid)
        return None

    def _find_children(self) -> None:
        """Add processes that last as long as the engine: SGLang gives them titles."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children():
                if child.pid not in self._children and _has_title(child):
                    self._children[child.pid] = child

    def _stopped(self) -> int | None:
        """Return the first process of SGLang that is stopped."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            of_engine = [*self._children.values()] if self._children else process.children(recursive=True)
            for each in (process, *of_engine):
                with suppress(psutil.NoSuchProcess):
                    if each.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                        return int(each.pid)
        return None

    def _kill(self) -> None:
        """Kill the process and its children by process id."""
        members = []
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            members = [*process.children(recursive=True), process]
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.wait()

    def last_words(self) -> str:
        """Return the end of the log, to be appended to an error message."""
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:] if self._log.exists() else []
        return "\n".join([f"; the end of {self._log}:", *lines]) if lines else ""


def _has_title(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any("sglang::" in part for part in process.cmdline())
    return False

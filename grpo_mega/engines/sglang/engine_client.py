"""Starts the process of one SGLang and talks to it: every wait has a limit; its end is an error with its last words.

Asserted by tests/unit/engines/sglang/test_engine_client.py and tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

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
from grpo_mega.engines.sglang.messages import HostSettings, with_limit

_HOST = "grpo_mega.engines.sglang.engine_process"
_START_SECONDS = 600.0  # imports and spawned processes, on a machine that many engines share
_END_SECONDS = 20.0
_LAST_LINES = 30  # of its log, in an error


class SglangProcess:
    """sglang/host.py in a child of this process. What it prints goes to `log`."""

    def __init__(
        self,
        arguments: dict[str, Any],
        *,
        tp: int,
        log: Path | None,
        timeout_seconds: float,
        gpus: Sequence[str] | None = None,
    ) -> None:
        """Returns at once; `started` waits.

        Args:
            arguments: of SGLang's Engine.
            tp: its ranks.
            log: see above; None: a temporary file.
            timeout_seconds: of an answer that does not wait for sampling.
            gpus: of its ranks, as CUDA_VISIBLE_DEVICES names them; None without CUDA.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="grpo_mega_sglang_"))
        self._log = log or self._folder / "sglang.log"
        self._timeout = timeout_seconds
        ours, theirs = socket.socketpair()
        with_limit(ours, timeout_seconds)
        with theirs, self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _HOST, str(theirs.fileno())],
                env=process_environment(os.environ, self._folder, tp, gpus),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a signal to the job's terminal is for the ranks
            )
        self._connection = Connection(ours.detach())
        self._owed = True  # the answer to the last request, here to the start
        self._send(HostSettings(arguments, self._folder, tp))

    @property
    def pid(self) -> int:
        return self._process.pid

    def started(self, beat_seconds: float) -> Iterator[None]:
        """Something every `beat_seconds`, until the engine is there.

        Raises:
            RuntimeError: it did not start (with the end of its log).
        """
        for _ in self._parts("start", _START_SECONDS, beat_seconds):
            yield None

    def call(self, command: str, *arguments: Any) -> Any:
        """The answer to one command.

        Raises:
            RuntimeError: refused, no answer in time, or the process has ended (with the end of its log).
        """
        self._finish_last()
        self._owed = True
        self._send((command, arguments))
        answer = None
        for part in self._parts(command, self._timeout, self._timeout):
            answer = part
        return answer

    def stream(self, command: str, *arguments: Any, beat_seconds: float) -> Iterator[Any]:
        """Its parts as they come, and None every `beat_seconds` without one; as long as the process lives.

        Raises:
            RuntimeError: as `call`.
        """
        self._finish_last()
        self._owed = True
        self._send((command, arguments))
        yield from self._parts(command, None, beat_seconds)

    def close(self) -> None:
        """Ends it and what it started. A second call does nothing."""
        if self._connection.closed:
            return
        with suppress(RuntimeError):
            self._timeout = min(self._timeout, _END_SECONDS)
            self.call("end")
        self._kill()
        self._connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _finish_last(self) -> None:
        """A caller who stopped in the middle of a stream left the rest of it."""
        if self._owed:
            for _ in self._parts("the rest of the last request", None, self._timeout):
                pass

    def _parts(self, command: str, limit: float | None, beat_seconds: float) -> Iterator[Any]:
        """Parts, None at each beat, and last the value of `done` unless it is None."""
        end = None if limit is None else time.monotonic() + limit
        while True:
            wait = beat_seconds if end is None else min(beat_seconds, end - time.monotonic())
            if wait <= 0:
                raise self._stands_still(f"answer {command}", limit)
            kind, value = self._receive(command) if self._connection.poll(wait) else ("beat", None)
            if kind == "done":
                self._owed = False
                if value is not None:
                    yield value
                return
            if kind == "failed":
                self._owed = False
                raise RuntimeError(f"SGLang: {value}{self.last_words()}")
            yield value

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return  # the answer says what happened
        except BlockingIOError as error:
            raise self._stands_still("take a message") from error

    def _receive(self, command: str) -> tuple[str, Any]:
        try:
            answer: tuple[str, Any] = self._connection.recv()
        except BlockingIOError as error:
            raise self._stands_still(f"complete its answer to {command}") from error
        except (EOFError, ConnectionResetError, BrokenPipeError) as error:
            self._kill()
            raise RuntimeError(
                f"SGLang's process {self.pid} has ended with exit code {self._process.returncode} ({command})"
                f"{self.last_words()}"
            ) from error
        return answer

    def _stands_still(self, what: str, limit: float | None = None) -> RuntimeError:
        """Nothing can be expected of it any more."""
        self._kill()
        return RuntimeError(f"SGLang did not {what} within {limit or self._timeout:g} s{self.last_words()}")

    def _kill(self) -> None:
        """It and its children, by their numbers."""
        members = []
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            members = [*process.children(recursive=True), process]
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.wait()

    def last_words(self) -> str:
        """The end of what it printed, to be appended to an error."""
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:] if self._log.exists() else []
        return "\n".join([f"; the end of {self._log}:", *lines]) if lines else ""

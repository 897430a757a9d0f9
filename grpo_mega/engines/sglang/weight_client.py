"""A training rank's client of the weight server in one SGLang scheduler process."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import psutil
import torch
from torch import Tensor

from grpo_mega.engines.sglang.messages import set_timeouts
from grpo_mega.engines.sglang.staging import Staging
from grpo_mega.engines.sglang.weight_server import WeightServerAddress
from grpo_mega.types import TensorSlice

_CHECK_SECONDS = 1.0  # between two looks at a scheduler that does not answer
_STOPPED_SECONDS = 30.0  # as in engine_client.py


class SchedulerGoneError(RuntimeError):
    """The scheduler process exited, is stopped, timed out, or holds another policy version; the client cannot be used
    any more."""


class WeightClient:
    """Connection of one training rank. Every wait has a timeout, and errors name the rank and the scheduler.

    Args:
        address: of the weight server.
        staging: the buffer through which slices reach the scheduler.
        rank: this training rank, for errors.
        timeout_seconds: limit of every wait.
        last_words: returns the end of SGLang's log, for errors.

    Raises:
        SchedulerGoneError: the weight server does not answer.
        RuntimeError: the scheduler cannot map the buffer.
    """

    def __init__(
        self,
        address: WeightServerAddress,
        staging: Staging,
        rank: int,
        timeout_seconds: float,
        last_words: Callable[[], str] = str,
    ) -> None:
        self._timeout, self._last_words, self._broken = timeout_seconds, last_words, ""
        self._process = address.process
        self._scheduler = f"SGLang's rank {address.rank} (process {address.process})"
        self._rank = f"rank {rank}"
        self._staging, self._staged = staging, list[tuple[TensorSlice, torch.dtype, int]]()
        try:
            self._connection = _connect(address, timeout_seconds)
            staging.share(self._connection, lambda place: self._send("map", place))
        except (OSError, EOFError, AuthenticationError) as error:
            raise self._end(f"did not accept {self._rank} ({type(error).__name__}: {error})") from error
        self._receive("map")

    @property
    def capacity_bytes(self) -> int:
        """Largest slice that fits into the buffer."""
        return self._staging.memory.numel()

    def stage(self, hf: TensorSlice, values: Tensor) -> None:
        """Copy a slice into the buffer; if it is full, first send the slices in it with `flush`."""
        start = self._staging.put(values)
        if start is None:
            self.flush()
            start = self._staging.put(values)
            assert start is not None, "slices are cut to what fits"
        self._staged.append((hf, values.dtype, start))

    def flush(self) -> None:
        """Have the scheduler write all slices in the buffer to its parameters."""
        if self._staged:
            self._staging.synchronize()
            slices, self._staged = self._staged, []
            self.call("write", slices)
            self._staging.empty()

    def drop(self) -> None:
        """Discard the slices in the buffer."""
        self._staged = []
        self._staging.empty()

    def call(self, command: str, *arguments: Any) -> Any:
        """Run one command in the scheduler process and return its answer.

        Raises:
            SchedulerGoneError: it timed out, or the process exited or has been stopped.
            RuntimeError: the command failed (with its message).
        """
        if self._broken:
            raise SchedulerGoneError(self._broken)
        try:
            self._send(command, *arguments)
        except BlockingIOError as error:
            raise self._end(f"did not accept {command} from {self._rank} within {self._timeout:g} s") from error
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._end(f"exited before {command} from {self._rank}") from error
        return self._receive(command)

    def require_version(self, found: int, expected: int) -> None:
        """Check that the scheduler holds the policy version that this rank sent.

        Raises:
            SchedulerGoneError: it holds another version.
        """
        if found != expected:
            raise self._end(f"holds version {found} of the weights, and {self._rank} sent version {expected}")

    def fault(self) -> str:
        """Return why the client cannot be used any more, or an empty string."""
        return self._broken

    def close(self) -> None:
        """Close the connection. A second call does nothing."""
        self._connection.close()

    def _send(self, command: str, *arguments: Any) -> None:
        self._connection.send((command, arguments))

    def _receive(self, command: str) -> Any:
        try:
            self._await_answer(command)
            kind, value = self._connection.recv()
        except BlockingIOError as error:
            raise self._end(f"did not complete its answer to {command} from {self._rank}") from error
        except (EOFError, ConnectionResetError) as error:
            raise self._end(f"exited while {self._rank} waited for {command}") from error
        if kind == "failed":
            raise RuntimeError(f"{self._scheduler}, {command} from {self._rank}: {value}")
        return value

    def _await_answer(self, command: str) -> None:
        begin, stopped_since = time.monotonic(), float("inf")
        while (left := begin + self._timeout - time.monotonic()) > 0:
            if self._connection.poll(min(left, _CHECK_SECONDS)):
                return
            now = time.monotonic()
            stopped_since = min(stopped_since, now) if self._is_stopped() else float("inf")
            if now - stopped_since >= _STOPPED_SECONDS:
                raise self._end(
                    f"has been stopped (SIGSTOP, or a debugger) for {_STOPPED_SECONDS:g} s while {self._rank} waited "
                    f"for {command}"
                )
        raise self._end(f"did not answer {command} from {self._rank} within {self._timeout:g} s")

    def _is_stopped(self) -> bool:
        try:
            return psutil.Process(self._process).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        except psutil.NoSuchProcess:
            return False

    def _end(self, what: str) -> SchedulerGoneError:
        self._broken = f"{self._scheduler} {what}{self._last_words()}"
        return SchedulerGoneError(self._broken)


def _connect(address: WeightServerAddress, timeout_seconds: float) -> Connection:
    """Connect like multiprocessing's `Client`, with a timeout for every wait."""
    with socket.socket(socket.AF_UNIX) as plain:
        set_timeouts(plain, timeout_seconds)
        plain.connect(address.path)
        connection = Connection(plain.detach())
    answer_challenge(connection, address.key)
    deliver_challenge(connection, address.key)
    return connection

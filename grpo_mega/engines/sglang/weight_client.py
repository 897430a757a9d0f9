"""A training rank's client of the weight server in one SGLang scheduler process."""

from __future__ import annotations

import socket
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import torch
from torch import Tensor

from grpo_mega.engines.sglang.messages import with_limit
from grpo_mega.engines.sglang.staging import Staging
from grpo_mega.engines.sglang.weight_server import WeightServerAddress
from grpo_mega.types import TensorSlice


class SchedulerGoneError(RuntimeError):
    """The scheduler behind a door is gone, silent, or of another version: nothing can be expected of it any more."""


class WeightClient:
    """A training rank's side: every wait has a limit and names both."""

    def __init__(
        self,
        address: WeightServerAddress,
        staging: Staging,
        rank: int,
        timeout_seconds: float,
        last_words: Callable[[], str] = str,
    ) -> None:
        """`last_words`: of the processes behind the door, for errors.

        Raises:
            SchedulerGoneError: nobody answers.
            RuntimeError: the buffer cannot be mapped there.
        """
        self._timeout, self._last_words, self._broken = timeout_seconds, last_words, ""
        self._there = f"SGLang's rank {address.rank} (process {address.process})"
        self._here = f"rank {rank}"
        self._staging, self._noted = staging, list[tuple[TensorSlice, torch.dtype, int]]()
        try:
            self._connection = _connected(address, timeout_seconds)
            staging.tell(self._connection, lambda place: self._send("map", place))
        except (OSError, EOFError, AuthenticationError) as error:
            raise self._end(f"opens no door to {self._here} ({type(error).__name__}: {error})") from error
        self._received("map")

    @property
    def capacity_bytes(self) -> int:
        """Of one slice."""
        return self._staging.memory.numel()

    def stage(self, hf: TensorSlice, values: Tensor) -> None:
        """Into the buffer; what is there goes through the door first if there is no room."""
        start = self._staging.put(values)
        if start is None:
            self.hand_over()
            start = self._staging.put(values)
            assert start is not None, "slices are cut to what fits"
        self._noted.append((hf, values.dtype, start))

    def hand_over(self) -> None:
        """What is in the buffer is written there."""
        if self._noted:
            self._staging.settle()
            noted, self._noted = self._noted, []
            self.call("write", noted)
            self._staging.empty()

    def drop(self) -> None:
        """Forget what is in the buffer."""
        self._noted = []
        self._staging.empty()

    def call(self, command: str, *arguments: Any) -> Any:
        """The answer.

        Raises:
            SchedulerGoneError: none in time, or its process has ended.
            RuntimeError: refused, with its words.
        """
        if self._broken:
            raise SchedulerGoneError(self._broken)
        try:
            self._send(command, *arguments)
        except BlockingIOError as error:
            raise self._end(f"did not take {command} of {self._here} within {self._timeout:g} s") from error
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._end(f"has ended before {command} of {self._here}") from error
        return self._received(command)

    def require_version(self, found: int, expected: int) -> None:
        """Raises SchedulerGoneError: the scheduler answers for other weights than this rank's."""
        if found != expected:
            raise self._end(f"answers with version {found} of the weights, and {self._here} sent version {expected}")

    def close(self) -> None:
        """A second call does nothing."""
        self._connection.close()

    def _send(self, command: str, *arguments: Any) -> None:
        self._connection.send((command, arguments))

    def _received(self, command: str) -> Any:
        try:
            if not self._connection.poll(self._timeout):
                raise self._end(f"did not answer {command} of {self._here} within {self._timeout:g} s")
            kind, value = self._connection.recv()
        except BlockingIOError as error:
            raise self._end(f"did not complete its answer to {command} of {self._here}") from error
        except (EOFError, ConnectionResetError) as error:
            raise self._end(f"has ended while {self._here} waited for {command}") from error
        if kind == "failed":
            raise RuntimeError(f"{self._there}, {command} of {self._here}: {value}")
        return value

    def _end(self, what: str) -> SchedulerGoneError:
        self._broken = f"{self._there} {what}{self._last_words()}"
        return SchedulerGoneError(self._broken)


def _connected(address: WeightServerAddress, timeout_seconds: float) -> Connection:
    """As multiprocessing's `Client`, with a limit for every wait."""
    with socket.socket(socket.AF_UNIX) as plain:
        with_limit(plain, timeout_seconds)
        plain.connect(address.path)
        connection = Connection(plain.detach())
    answer_challenge(connection, address.key)
    deliver_challenge(connection, address.key)
    return connection

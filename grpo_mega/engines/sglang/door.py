"""The door of one scheduler process of SGLang: its training rank writes weights through it and asks what is there.

A scheduler is in its own event loop, and SGLang's own way in goes through the first rank's process and is for whole
engines. So each one has a thread that answers its rank alone, over a Unix socket with a key. The rank puts slices into
its staging buffer (staging.py) and says which; this side copies them to where SGLang's kernels read, and makes digests
of what is there. On CUDA the parameters themselves are in memory that SGLang releases and takes back, which no other
process can map: the buffer is what both see.
Requests are (command, arguments), answers ("done", value) or ("failed", text).
Asserted by tests/unit/test_sglang_door.py and tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_mega.engines.record import LoaderRecord
from grpo_mega.engines.region_sink import RegionSink
from grpo_mega.engines.regions import PlainRegion, Regions, Zeros, region_view
from grpo_mega.engines.sglang.messages import with_limit
from grpo_mega.engines.sglang.staging import Staging, mapped_staging, settle, staged_at
from grpo_mega.interfaces import SinkRegion
from grpo_mega.types import Placement, TensorSlice


@dataclass(frozen=True)
class DoorAddress:
    """Of the scheduler with this rank and process number."""

    rank: int
    process: int
    path: str
    key: bytes = field(repr=False)


def recorded_regions(record: LoaderRecord) -> list[SinkRegion]:
    """What a sync fills, in the order of the record on both sides of the door."""
    return [SinkRegion(Placement(copy.hf, copy.local), "plain", copy.dtype) for copy in record.copies]


class Door:
    """Opened in the scheduler's process; answers for as long as that lives.

    Args:
        record: of the model's loader.
        tensors: name -> parameter or buffer, where the kernels read it.
        require_place: raises RuntimeError once SGLang has put one of them elsewhere.
    """

    def __init__(self, record: LoaderRecord, tensors: dict[str, Tensor], require_place: Callable[[], None]) -> None:
        self._sink = _ModelSink(record, tensors)
        self._require_place = require_place
        self._device = next(iter(tensors.values())).device
        self._staged: Tensor | None = None
        self._commands: dict[str, Callable[..., Any]] = {
            "begin": self._sink.begin_update,
            "write": self._write,
            "end": self._end,
            "digests": self._digests,
            "probe": self._sink.probe,
        }

    def open(self, folder: Path, rank: int, process: int) -> DoorAddress:
        """Starts the thread. A path in `folder` is the socket's."""
        address = DoorAddress(rank, process, str(folder / f"door_{rank}"), secrets.token_bytes(32))
        listener = Listener(address.path, family="AF_UNIX", authkey=address.key)
        threading.Thread(target=self._serve, args=(listener,), name="grpo_mega_door", daemon=True).start()
        return address

    def _serve(self, listener: Listener) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        with torch.inference_mode():  # is of the thread; SGLang makes some of its tensors inside of it
            while True:
                with suppress(AuthenticationError, EOFError, ConnectionError), listener.accept() as connection:
                    while True:
                        connection.send(self._answer(connection, *connection.recv()))

    def _answer(self, connection: Connection, command: str, arguments: Sequence[Any]) -> tuple[str, Any]:
        try:
            if command == "map":
                (place,) = arguments
                self._staged = mapped_staging(place, connection, self._device)
                return "done", None
            return "done", self._commands[command](*arguments)
        except Exception as error:  # whatever it is: the thread's end would be silent, and the rank waits
            return "failed", f"{type(error).__name__}: {error}"

    def _write(self, slices: Sequence[tuple[TensorSlice, torch.dtype, int]]) -> None:
        """Each slice from its start in the buffer."""
        assert self._staged is not None, "the buffer is mapped first"
        for hf, dtype, start in slices:
            self._sink.write(hf, staged_at(self._staged, start, hf.shape, dtype))
        settle(self._device)  # the rank writes the next ones over them

    def _end(self, policy_version: int) -> int:
        self._sink.end_update(policy_version)
        settle(self._device)
        return self._sink.policy_version

    def _digests(self, slices: Sequence[TensorSlice]) -> tuple[int, list[int]]:
        """The version behind them, and the digests of what is there now."""
        self._require_place()
        return self._sink.policy_version, self._sink.digests(slices)


class _ModelSink(RegionSink):
    def __init__(self, record: LoaderRecord, tensors: dict[str, Tensor]) -> None:
        places = [PlainRegion(region_view(tensors[copy.local.name], copy)) for copy in record.copies]
        zeros = [Zeros(box.name, tensors[box.name][box.index]) for box in record.zeros]
        super().__init__(Regions(recorded_regions(record), places, zeros), None)

    def _adopt(self, policy_version: int) -> None:
        """Kernels read the parameters themselves; caches go with the prefix cache (sglang/worker.py)."""


class DoorError(RuntimeError):
    """The scheduler behind a door is gone, silent, or of another version: nothing can be expected of it any more."""


class DoorLink:
    """A training rank's side: every wait has a limit and names both."""

    def __init__(
        self,
        address: DoorAddress,
        staging: Staging,
        rank: int,
        timeout_seconds: float,
        last_words: Callable[[], str] = str,
    ) -> None:
        """`last_words`: of the processes behind the door, for errors.

        Raises:
            DoorError: nobody answers.
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
            DoorError: none in time, or its process has ended.
            RuntimeError: refused, with its words.
        """
        if self._broken:
            raise DoorError(self._broken)
        try:
            self._send(command, *arguments)
        except BlockingIOError as error:
            raise self._end(f"did not take {command} of {self._here} within {self._timeout:g} s") from error
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._end(f"has ended before {command} of {self._here}") from error
        return self._received(command)

    def require_version(self, found: int, expected: int) -> None:
        """Raises DoorError: the scheduler answers for other weights than this rank's."""
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

    def _end(self, what: str) -> DoorError:
        self._broken = f"{self._there} {what}{self._last_words()}"
        return DoorError(self._broken)


def _connected(address: DoorAddress, timeout_seconds: float) -> Connection:
    """As multiprocessing's `Client`, with a limit for every wait."""
    with socket.socket(socket.AF_UNIX) as plain:
        with_limit(plain, timeout_seconds)
        plain.connect(address.path)
        connection = Connection(plain.detach())
    answer_challenge(connection, address.key)
    deliver_challenge(connection, address.key)
    return connection

"""The weight server of one SGLang scheduler process: its training rank writes weights through it and verifies them.

A scheduler runs its own event loop, and SGLang's own interface goes through the first rank's process and serves whole
engines only. Therefore each scheduler has a thread that serves its training rank over an authenticated Unix socket. The
rank copies slices into its staging buffer (staging.py) and sends their names. The server copies them to where SGLang's
kernels read, and computes digests there. On CUDA the parameters are in memory that SGLang releases and allocates again,
which no other process can map; both processes map the buffer instead.
Requests are (command, arguments); answers are ("done", value) or ("failed", text).
Asserted by tests/unit/engines/sglang/test_weight_server.py and tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_mega.engines.sglang.staging import mapped_staging, staged_at, synchronize
from grpo_mega.engines.weights.loader_recording import LoaderRecord
from grpo_mega.engines.weights.regions import PlainRegion, Regions, Zeros, region_view
from grpo_mega.engines.weights.sink import RegionSink
from grpo_mega.interfaces import SinkRegion
from grpo_mega.types import Placement, TensorSlice


@dataclass(frozen=True)
class WeightServerAddress:
    """Address of the weight server in one scheduler."""

    rank: int
    """Tensor-parallel rank of the scheduler."""
    process: int
    """Process id of the scheduler."""
    path: str
    """Path of the Unix socket."""
    key: bytes = field(repr=False)
    """Shared secret of the connection."""


def recorded_regions(record: LoaderRecord) -> list[SinkRegion]:
    """Return the regions that a sync fills, in the order of the record; client and server agree on it."""
    return [SinkRegion(Placement(copy.hf, copy.local), "plain", copy.dtype) for copy in record.copies]


class WeightServer:
    """A server thread in the scheduler process, which runs until the process exits.

    Args:
        record: recorded loader of the model.
        tensors: name -> parameter or buffer that the kernels read.
        require_unmoved: raises RuntimeError if SGLang has moved one of them.
    """

    def __init__(self, record: LoaderRecord, tensors: dict[str, Tensor], require_unmoved: Callable[[], None]) -> None:
        self._sink = _ModelSink(record, tensors)
        self._require_unmoved = require_unmoved
        self._device = next(iter(tensors.values())).device
        self._staged: Tensor | None = None
        self._commands: dict[str, Callable[..., Any]] = {
            "begin": self._sink.begin_update,
            "write": self._write,
            "end": self._end,
            "digests": self._digests,
            "probe": self._sink.probe,
        }

    def start(self, folder: Path, rank: int, process: int) -> WeightServerAddress:
        """Start the thread and return its address; the socket is in `folder`."""
        address = WeightServerAddress(rank, process, str(folder / f"weights_{rank}"), secrets.token_bytes(32))
        listener = Listener(address.path, family="AF_UNIX", authkey=address.key)
        threading.Thread(target=self._serve, args=(listener,), name="grpo_mega_weights", daemon=True).start()
        return address

    def _serve(self, listener: Listener) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        with torch.inference_mode():  # set per thread; SGLang creates some tensors in inference mode
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
        except Exception as error:  # any error: the thread would exit silently while the rank waits
            return "failed", f"{type(error).__name__}: {error}"

    def _write(self, slices: Sequence[tuple[TensorSlice, torch.dtype, int]]) -> None:
        """Write slices; each is a name, a dtype and the offset in the buffer."""
        assert self._staged is not None, "the client maps the buffer first"
        for hf, dtype, start in slices:
            self._sink.write(hf, staged_at(self._staged, start, hf.shape, dtype))
        synchronize(self._device)  # the rank overwrites the buffer after the answer

    def _end(self, policy_version: int) -> int:
        self._sink.end_update(policy_version)
        synchronize(self._device)
        return self._sink.policy_version

    def _digests(self, slices: Sequence[TensorSlice]) -> tuple[int, list[int]]:
        """Return the policy version and the digests of the present values."""
        self._require_unmoved()
        return self._sink.policy_version, self._sink.digests(slices)


class _ModelSink(RegionSink):
    def __init__(self, record: LoaderRecord, tensors: dict[str, Tensor]) -> None:
        places = [PlainRegion(region_view(tensors[copy.local.name], copy)) for copy in record.copies]
        zeros = [Zeros(box.name, tensors[box.name][box.index]) for box in record.zeros]
        super().__init__(Regions(recorded_regions(record), places, zeros), None)

    def _finish_update(self, policy_version: int) -> None:
        """Do nothing: kernels read the parameters, and the engine process clears the prefix cache."""

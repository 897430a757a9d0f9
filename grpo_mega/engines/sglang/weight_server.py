"""The door of one scheduler process of SGLang: its training rank writes weights through it and asks what is there.

A scheduler is in its own event loop, and SGLang's own way in goes through the first rank's process and is for whole
engines. So each one has a thread that answers its rank alone, over a Unix socket with a key. The rank puts slices into
its staging buffer (staging.py) and says which; this side copies them to where SGLang's kernels read, and makes digests
of what is there. On CUDA the parameters themselves are in memory that SGLang releases and takes back, which no other
process can map: the buffer is what both see.
Requests are (command, arguments), answers ("done", value) or ("failed", text).
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

from grpo_mega.engines.sglang.staging import mapped_staging, settle, staged_at
from grpo_mega.engines.weights.loader_recording import LoaderRecord
from grpo_mega.engines.weights.regions import PlainRegion, Regions, Zeros, region_view
from grpo_mega.engines.weights.sink import RegionSink
from grpo_mega.interfaces import SinkRegion
from grpo_mega.types import Placement, TensorSlice


@dataclass(frozen=True)
class WeightServerAddress:
    """Of the scheduler with this rank and process number."""

    rank: int
    process: int
    path: str
    key: bytes = field(repr=False)


def recorded_regions(record: LoaderRecord) -> list[SinkRegion]:
    """What a sync fills, in the order of the record on both sides of the door."""
    return [SinkRegion(Placement(copy.hf, copy.local), "plain", copy.dtype) for copy in record.copies]


class WeightServer:
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

    def open(self, folder: Path, rank: int, process: int) -> WeightServerAddress:
        """Starts the thread. A path in `folder` is the socket's."""
        address = WeightServerAddress(rank, process, str(folder / f"door_{rank}"), secrets.token_bytes(32))
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

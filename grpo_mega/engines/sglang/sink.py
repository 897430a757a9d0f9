"""The end of a weight sync on one rank of SGLang, whose parameters are in one of SGLang's own processes.

The layout is the record of SGLang's own loader (sglang/worker.py). What this rank writes goes through the door of its
scheduler (sglang/door.py) to where SGLang's kernels read, and digests are made there, of what they read: bf16 and fp32
models are computed from plain parameters (docs/decisions/sglang.md), and with every digest that process confirms that
they are still where the door writes. Where a loader could not be recorded, tensors are streamed through it, whole, once
their names and shapes are known to be the model's: SGLang drops unknown names without a word, and a wrong shape ends
its processes.
Asserted by tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grpo_mega.engines.sglang.engine_client import SglangProcess
from grpo_mega.engines.sglang.staging import parts_that_fit
from grpo_mega.engines.sglang.weight_client import WeightClient
from grpo_mega.engines.sglang.weight_server import recorded_regions
from grpo_mega.engines.weights.loader_recording import LoaderRecord, Shape
from grpo_mega.engines.weights.regions import inside
from grpo_mega.engines.weights.sink import SliceSink
from grpo_mega.interfaces import SinkRegion
from grpo_mega.types import TensorSlice


class SglangSink(SliceSink):
    """`WeightSink` over the parameters of one of SGLang's processes.

    Args:
        process: SGLang's, on the first rank of the engine; None on the others.
        door: of the scheduler with this rank's number, and the record of its loader; or why whole tensors are streamed.
        tensors: shape and dtype of every tensor that a sync brings.
        bucket_bytes: of whole tensors that go to SGLang at a time.
    """

    def __init__(
        self,
        process: SglangProcess | None,
        door: tuple[WeightClient, LoaderRecord] | str,
        tensors: Mapping[str, tuple[Shape, torch.dtype]],
        bucket_bytes: int = 64 * 2**20,
    ) -> None:
        self._process, self._tensors, self._bucket_bytes = process, tensors, bucket_bytes
        self._door = None if isinstance(door, str) else door[0]
        super().__init__(
            [] if isinstance(door, str) else recorded_regions(door[1]), door if isinstance(door, str) else None
        )
        self._bucket: list[tuple[str, Tensor]] = []
        self._loaded: set[str] = set()

    def begin_update(self) -> None:
        super().begin_update()
        self._bucket, self._loaded = [], set()
        if self._door is not None:
            self._door.drop()
            self._door.call("begin")

    def digests(self, slices: Sequence[TensorSlice]) -> list[int]:
        """Made in SGLang's process, of what its kernels read now.

        Raises:
            ValueError: one is not inside a region of the layout.
            RuntimeError: SGLang holds another version, has put a parameter elsewhere, or does not answer.
        """
        for hf in slices:
            self._around(hf)
        if self._door is None:
            return []
        version, digests = self._door.call("digests", list(slices))
        self._door.require_version(version, self.policy_version)
        return list(digests)

    def probe(self) -> dict[str, str]:
        return {} if self._door is None else dict(self._door.call("probe"))

    def forget(self) -> None:
        """SGLang has released its weights: nothing is sampled before the next sync has brought all of them."""
        self.policy_version = -1

    def load(self, name: str, tensor: Tensor) -> None:
        """Give a whole tensor to SGLang's loader.

        Raises:
            ValueError: the model has no such tensor, or one of another shape.
            RuntimeError: outside of begin_update .. end_update, or SGLang refused.
        """
        self.require_update(name)
        if name not in self._tensors:
            raise ValueError(f"{name} is no tensor of the engine's model, and SGLang would drop it without a word")
        shape, dtype = self._tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got a tensor of shape {list(tensor.shape)} for one of {list(shape)}")
        self._loaded.add(name)
        if self._process is None:
            return
        self._bucket.append((name, tensor.detach().to("cpu", dtype, copy=True)))
        if sum(held.nbytes for _, held in self._bucket) >= self._bucket_bytes:
            self._send_bucket()

    def _put(self, regions: Sequence[SinkRegion], hf: TensorSlice, values: Tensor) -> None:
        """The scheduler knows the regions itself."""
        assert self._door is not None, "a layout without a door"
        for part in parts_that_fit(hf, self._door.capacity_bytes // values.itemsize):
            self._door.stage(part, values[inside(hf, part)])

    def _adopt(self, policy_version: int) -> None:
        if self._door is None and (missing := self._tensors.keys() - self._loaded):
            raise ValueError(f"the update lacks {', '.join(sorted(missing)[:3])} ({len(missing)} tensors in all)")
        if self._door is not None:
            self._door.hand_over()
            self._door.require_version(self._door.call("end", policy_version), policy_version)
        if self._process is not None:
            self._send_bucket()
            self._process.call("adopt", policy_version)

    def _send_bucket(self) -> None:
        if self._bucket and self._process is not None:
            # by value: torch's pickler for processes hands over descriptors, to nobody but this process's own children
            self._process.call("load", pickle.dumps(self._bucket))
        self._bucket = []

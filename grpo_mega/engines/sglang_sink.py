"""The end of a weight sync on one rank of SGLang, whose parameters lie in memory that this rank has mapped.

The layout is the record of SGLang's own loader (sglang_worker.py). The bytes that this rank writes and digests are
those that SGLang's kernels read: without CUDA and without sgl_kernel it computes from plain parameters, and at the end
of every update each of its processes confirms that they are still where the rank writes. Where a loader could not be
recorded, tensors are streamed through it, whole, once their names and shapes are known to be the model's: SGLang drops
unknown names without a word, and a wrong shape ends its processes.
Asserted by tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Mapping

import torch
from torch import Tensor

from grpo_mega.engines.record import Shape
from grpo_mega.engines.region_sink import RegionSink
from grpo_mega.engines.regions import PlainRegion, Regions, Zeros, region_view
from grpo_mega.engines.sglang_process import SglangProcess
from grpo_mega.engines.sglang_worker import SharedModel, place_of
from grpo_mega.interfaces import SinkRegion
from grpo_mega.types import Placement


class SglangSink(RegionSink):
    """`WeightSink` over the parameters of one of SGLang's processes.

    Args:
        process: SGLang's, on the first rank of the engine; None on the others.
        shared: the parameters of the process with this rank's number; or why whole tensors are streamed.
        tensors: shape and dtype of every tensor that a sync brings.
        bucket_bytes: of whole tensors that go to SGLang at a time.
    """

    def __init__(
        self,
        process: SglangProcess | None,
        shared: SharedModel | str,
        tensors: Mapping[str, tuple[Shape, torch.dtype]],
        bucket_bytes: int = 64 * 2**20,
    ) -> None:
        self._process, self._tensors, self._bucket_bytes = process, tensors, bucket_bytes
        super().__init__(
            Regions([], [], []) if isinstance(shared, str) else _regions(shared),
            shared if isinstance(shared, str) else None,
        )
        self._bucket: list[tuple[str, Tensor]] = []
        self._loaded: set[str] = set()

    def begin_update(self) -> None:
        super().begin_update()
        self._bucket, self._loaded = [], set()

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
        self._bucket.append((name, tensor.detach().to(dtype, copy=True)))
        if sum(held.nbytes for _, held in self._bucket) >= self._bucket_bytes:
            self._send_bucket()

    def _adopt(self, policy_version: int) -> None:
        if self.streams_because is not None and (missing := self._tensors.keys() - self._loaded):
            raise ValueError(f"the update lacks {', '.join(sorted(missing)[:3])} ({len(missing)} tensors in all)")
        if self._process is not None:
            self._send_bucket()
            self._process.call("adopt", policy_version)

    def _send_bucket(self) -> None:
        if self._bucket and self._process is not None:
            # by value: torch's pickler for processes hands over descriptors, to nobody but this process's own children
            self._process.call("load", pickle.dumps(self._bucket))
        self._bucket = []


def _regions(shared: SharedModel) -> Regions:
    """Maps the memory: it stays as long as the regions, also when its process is gone."""
    assert not isinstance(shared.record, str), "streamed"
    descriptor = os.open(f"/proc/{shared.process}/fd/{shared.descriptor}", os.O_RDWR)
    try:
        memory = torch.frombuffer(mmap.mmap(descriptor, shared.num_bytes), dtype=torch.uint8)
    finally:
        os.close(descriptor)
    parameters = {name: place_of(memory, *place) for name, place in shared.places.items()}
    copies = shared.record.copies
    return Regions(
        [SinkRegion(Placement(copy.hf, copy.local), "plain", copy.dtype) for copy in copies],
        [PlainRegion(region_view(parameters[copy.local.name], copy)) for copy in copies],
        [Zeros(box.name, parameters[box.name][box.index]) for box in shared.record.zeros],
    )

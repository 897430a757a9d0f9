"""The SGLang end of a weight sync on one rank, whose parameters are in one of SGLang's own processes.

The layout is the recorded loader of SGLang (sglang/scheduler_hooks.py). Slices go through the weight server of the
scheduler (sglang/weight_server.py) to where SGLang's kernels read. Digests are computed there, of the values that the
kernels read: models in bf16 and fp32 compute from plain parameters (docs/decisions/sglang.md). With every digest the
scheduler confirms that the parameters have not moved. If a loader cannot be recorded, whole tensors are streamed
through it after their names and shapes are checked: SGLang ignores unknown names silently, and a wrong shape ends its
processes.
Asserted by tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grpo_mega.engines.sglang.engine_client import SglangProcess
from grpo_mega.engines.sglang.messages import pickled_tensors
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
        process: the SGLang process, on the first rank of the engine; None on the others.
        target: weight client of this rank's scheduler and its recorded loader, or the reason for streaming.
        tensors: name -> (shape, dtype) of every tensor that a sync brings.
        bucket_bytes: size of the whole tensors that are sent to SGLang at a time.
    """

    def __init__(
        self,
        process: SglangProcess | None,
        target: tuple[WeightClient, LoaderRecord] | str,
        tensors: Mapping[str, tuple[Shape, torch.dtype]],
        bucket_bytes: int = 64 * 2**20,
    ) -> None:
        self._process, self._tensors, self._bucket_bytes = process, tensors, bucket_bytes
        self._client = None if isinstance(target, str) else target[0]
        super().__init__(
            [] if isinstance(target, str) else recorded_regions(target[1]), target if isinstance(target, str) else None
        )
        self._bucket: list[tuple[str, Tensor]] = []
        self._loaded: set[str] = set()

    def begin_update(self) -> None:
        super().begin_update()
        self._bucket, self._loaded = [], set()
        if self._client is not None:
            self._client.drop()
            self._client.call("begin")

    def digests(self, slices: Sequence[TensorSlice]) -> list[int]:
        """Return digests that SGLang's process computes of the values that its kernels read now.

        Raises:
            ValueError: a slice is not inside a region of the layout.
            RuntimeError: SGLang holds another version, has moved a parameter, or does not answer.
        """
        for hf in slices:
            self._around(hf)
        if self._client is None:
            return []
        version, digests = self._client.call("digests", list(slices))
        self._client.require_version(version, self.policy_version)
        return list(digests)

    def probe(self) -> dict[str, str]:
        return {} if self._client is None else dict(self._client.call("probe"))

    def load(self, name: str, tensor: Tensor) -> None:
        """Give a whole tensor to SGLang's loader.

        Raises:
            ValueError: the model has no such tensor, or its shape differs.
            RuntimeError: called outside of begin_update .. end_update, or SGLang failed.
        """
        self.require_update(name)
        if name not in self._tensors:
            raise ValueError(f"{name}: the engine's model has no such tensor, and SGLang would ignore it silently")
        shape, dtype = self._tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got a tensor of shape {list(tensor.shape)}; expected {list(shape)}")
        self._loaded.add(name)
        if self._process is None:
            return
        self._bucket.append((name, tensor.detach().to("cpu", dtype, copy=True)))
        if sum(held.nbytes for _, held in self._bucket) >= self._bucket_bytes:
            self._send_bucket()

    def _put(self, regions: Sequence[SinkRegion], hf: TensorSlice, values: Tensor) -> None:
        """Stage the slice; the scheduler finds the regions itself."""
        assert self._client is not None, "a sink with a layout has a client"
        for part in parts_that_fit(hf, self._client.capacity_bytes // values.itemsize):
            self._client.stage(part, values[inside(hf, part)])

    def _finish_update(self, policy_version: int) -> None:
        if self._client is None and (missing := self._tensors.keys() - self._loaded):
            raise ValueError(
                f"the update is incomplete: {len(missing)} tensors are missing, e.g. {', '.join(sorted(missing)[:3])}"
            )
        if self._client is not None:
            self._client.flush()
            self._client.require_version(self._client.call("end", policy_version), policy_version)
        if self._process is not None:
            self._send_bucket()
            self._process.call("finish_update", policy_version)

    def _send_bucket(self) -> None:
        if self._bucket and self._process is not None:
            # pickled by value: torch's multiprocessing pickler sends descriptors that only child processes can open
            self._process.call("load", pickled_tensors(self._bucket))
        self._bucket = []

"""The end of a weight sync on one rank of vLLM: writes slices into the parameters that its kernels read.

Linears keep a plain weight (vllm_start.py sees to it), so the bytes that `read` returns are what computes. The head is
the exception on CPU: a repacked copy computes logits, `end_update` rebuilds it and `probe` compares it with the plain
one (tests/engine/test_vllm_engine.py makes the copy stale).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grpo_mega.engines.vllm_layout import VOCAB_PADDING
from grpo_mega.interfaces import SinkRegion
from grpo_mega.types import TensorSlice

_PROBE_ROWS = 8  # vectors of the probe
_PROBE_SLICE = 8192  # rows of the head that are held in float64 at a time


class VllmSink:
    """`WeightSink` over the parameters of vLLM's model. `policy_version` is -1 before the first sync.

    Raises:
        RuntimeError: the regions do not cover the model's parameters exactly (names the parameter).
    """

    def __init__(self, model: nn.Module, regions: Sequence[SinkRegion], drop_caches: Callable[[], None]) -> None:
        self._head: Any = model.lm_head
        self._parameters = {name: parameter.data for name, parameter in model.named_parameters()}
        check_coverage(regions, {name: tuple(p.shape) for name, p in self._parameters.items()})
        self._regions = tuple(regions)
        self._by_slice = {region.placement.hf: region for region in self._regions}
        self._drop_caches = drop_caches
        self.policy_version = -1
        self.updating = False

    def layout(self) -> Sequence[SinkRegion]:
        return self._regions

    def begin_update(self) -> None:
        self.updating = True

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        """Copy `values` into the region of `hf`.

        Raises:
            ValueError: `hf` is not a slice of the layout; `values` has another shape or dtype.
            RuntimeError: outside of begin_update .. end_update.
        """
        if not self.updating:
            raise RuntimeError(f"write of {hf} outside of an update; call begin_update first")
        region = self._region(hf)
        if tuple(values.shape) != hf.shape or values.dtype != region.dtype:
            raise ValueError(
                f"{hf}: got {values.dtype} {list(values.shape)} for a region of {region.dtype} {list(hf.shape)}"
            )
        region.copy_(values)

    def end_update(self, policy_version: int) -> None:
        # What vLLM itself does with a loaded head: packs a copy on CPU, nothing on CUDA.
        self._head.quant_method.process_weights_after_loading(self._head)
        self._drop_caches()
        self.policy_version = policy_version
        self.updating = False

    def read(self, hf: TensorSlice) -> Tensor:
        return self._region(hf).clone()

    @torch.no_grad()
    def probe(self) -> dict[str, float]:
        """For the head: max |kernel(x) - W x| / max |W x|, W x in float64 from the plain weight, x fixed."""
        derived = {region.placement.local.name for region in self._regions if region.kind == "derived"}
        return {name: self._head_error(self._parameters[name]) for name in sorted(derived)}

    def _head_error(self, weight: Tensor) -> float:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_PROBE_ROWS, weight.shape[1], generator=generator).to(weight)
        computed: Tensor = self._head.quant_method.apply(self._head, x, bias=None)
        error = scale = 0.0
        for start in range(0, weight.shape[0], _PROBE_SLICE):
            expected = x.double() @ weight[start : start + _PROBE_SLICE].double().T
            error = max(error, float((computed[:, start : start + _PROBE_SLICE] - expected).abs().max()))
            scale = max(scale, float(expected.abs().max()))
        return error / scale if scale > 0 else error

    def _region(self, hf: TensorSlice) -> Tensor:
        if hf not in self._by_slice:
            raise ValueError(f"{hf} is not a slice that this engine rank takes; its layout() lists them")
        local = self._by_slice[hf].placement.local
        return self._parameters[local.name][local.index]


def check_coverage(regions: Sequence[SinkRegion], parameters: dict[str, tuple[int, ...]]) -> None:
    """Regions must fill every parameter exactly once; only padding at the end of a vocabulary may stay uncovered.

    Raises:
        RuntimeError: names the first parameter for which that does not hold.
    """
    boxes: dict[str, list[TensorSlice]] = defaultdict(list)
    for region in regions:
        boxes[region.placement.local.name].append(region.placement.local)
    if unknown := sorted(set(boxes) - set(parameters)):
        raise RuntimeError(f"the layout names {unknown[0]}, which is no parameter of vLLM's model")
    for name, shape in parameters.items():
        covered = 0
        for box in sorted(boxes[name], key=lambda box: box.offsets):
            if box.offsets != (covered, *[0] * (len(shape) - 1)) or box.shape[1:] != shape[1:]:
                raise RuntimeError(f"{box} does not continue row {covered} of vLLM's parameter {name} {list(shape)}")
            covered += box.shape[0]
        is_vocab = name in ("model.embed_tokens.weight", "lm_head.weight")
        padding = shape[0] - covered
        if not 0 <= padding < (VOCAB_PADDING if is_vocab else 1):
            raise RuntimeError(f"the layout covers {covered} of {shape[0]} rows of vLLM's parameter {name}")

"""Regions of vLLM's parameters after loading: plain bytes, permuted bytes, or bytes from which copies are derived.

vLLM processes weights after loading. Every parameter must end up in a form that is known here; any other is an error.
- On CPU linear layers keep a plain weight (vllm/lifecycle.py).
- The head computes from a packed copy beside its plain weight, and latent attention from transposed copies of
  `kv_b_proj`. Both are rebuilt at the end of an update and verified.
- Some attention backends read copies of the attention sinks (vllm/attention_sinks.py).
- Experts are packed in place: slices are written to the packed positions and read back from there.
  On CUDA the arguments choose a kernel that keeps their order (vllm/arguments.py).
- For FP8 values and scales the kernel must be known too (vllm/fp8.py), because some kernels use their own order or
  scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo_mega.engines.vllm.attention_sinks import sink_copies
from grpo_mega.engines.vllm.fp8 import unknown_kernel
from grpo_mega.engines.weights.loader_recording import LoaderRecord, RecordedCopy
from grpo_mega.engines.weights.regions import DerivedCopy, PlainRegion, Region, Regions, Zeros, region_view
from grpo_mega.interfaces import RegionKind, SinkRegion
from grpo_mega.quantization.block_fp8 import dequantize
from grpo_mega.quantization.fp8_checkpoint import SCALE_SUFFIX
from grpo_mega.types import Placement, TensorSlice

_PROBE_COLUMNS = 16  # columns of the weight that are read exactly through the kernel
_PROBE_ROWS = 8  # random vectors
_PROBE_SLICE = 8192  # rows of the weight that are in float64 at the same time
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative rounding error of y = W x


@dataclass
class PackedHead:
    """A layer that computes y = W x from a copy of its plain weight in the kernel's own layout."""

    parameter: str
    layer: Any
    probes: int = 0

    def rebuild(self) -> None:
        """Run vLLM's own step after loading, which packs a copy on CPU and does nothing on CUDA."""
        self.layer.quant_method.process_weights_after_loading(self.layer)

    @torch.no_grad()
    def difference(self) -> str | None:
        """Return how the packed copy differs from the present weight; None if it does not.

        Unit vectors e read columns of W exactly, as y = W e; each call reads other columns. Random vectors read all
        columns at every call, up to rounding.
        """
        weight: Tensor = self.layer.weight
        rows, columns = weight.shape
        chosen = (torch.arange(_PROBE_COLUMNS) * (columns // _PROBE_COLUMNS + 1) + self.probes) % columns
        self.probes += 1
        units = torch.zeros(_PROBE_COLUMNS, columns).index_put_((torch.arange(_PROBE_COLUMNS), chosen), torch.ones(()))
        x = torch.randn(_PROBE_ROWS, columns, generator=torch.Generator().manual_seed(self.probes))
        computed: Tensor = self.layer.quant_method.apply(self.layer, torch.cat([units, x]).to(weight), bias=None)
        exact, rounded = computed[:_PROBE_COLUMNS].T, computed[_PROBE_COLUMNS:]
        different = int((exact != weight[:, chosen.to(weight.device)]).any(1).sum())
        if different:
            return f"{different} of {rows} rows differ from the plain weight"
        error = scale = 0.0
        for start in range(0, rows, _PROBE_SLICE):
            expected = x.to(weight).double() @ weight[start : start + _PROBE_SLICE].double().T
            error = max(error, float((rounded[:, start : start + _PROBE_SLICE] - expected).abs().max()))
            scale = max(scale, float(expected.abs().max()))
        limit = _TOLERANCE[weight.dtype]
        if not error <= limit * scale:
            return f"y = W x is off by {error / scale if scale else error:.3g}, more than {limit:g}"
        return None


@dataclass
class AbsorbedProjection:
    """Latent attention that computes with `W_UV` and `W_UK_T`, two transposed parts of its `kv_b_proj`."""

    parameter: str
    attention: Any
    dtype: torch.dtype

    def rebuild(self) -> None:
        """Run vLLM's own step after loading."""
        self.attention.process_weights_after_loading(self.dtype)

    def difference(self) -> str | None:
        """Return how a copy differs from the present weight, bit for bit; None if neither does."""
        layer = self.attention
        nope, value = layer.qk_nope_head_dim, layer.v_head_dim
        heads = self._projection().view(layer.num_heads, nope + value, layer.kv_lora_rank)
        key, values = heads[:, :nope], heads[:, nope:].transpose(1, 2)  # [N, P, L], [N, L, V]
        for name, expected in (("W_UK_T", key), ("W_UV", values)):
            different = int((getattr(layer, name) != expected).sum())
            if different:
                return f"{different} of {expected.numel()} elements of {name} differ from kv_b_proj"
        return None

    def _projection(self) -> Tensor:
        """Return `kv_b_proj`, dequantized if it is FP8."""
        weight: Tensor = self.attention.kv_b_proj.weight.detach()
        return dequantize(weight, self.attention.kv_b_proj.weight_scale_inv) if weight.itemsize == 1 else weight


@dataclass(frozen=True)
class PermutedRegion:
    """A region whose elements have another order than the checkpoint."""

    packed: Tensor
    start: int
    """Element of `packed` at which the region begins."""
    places: Tensor
    """Position of each element after `start`, in the shape of the checkpoint slice."""

    def memory_of(self, inside: tuple[slice, ...]) -> Tensor | None:
        return None

    def read(self, inside: tuple[slice, ...]) -> Tensor:
        return self.packed.view(-1)[self.places[inside] + self.start]

    def write(self, inside: tuple[slice, ...], values: Tensor) -> None:
        self.packed.view(-1)[self.places[inside] + self.start] = values


def declare_regions(model: nn.Module, record: LoaderRecord | None) -> Regions:
    """Return the regions of a loaded and processed model; no regions without a record.

    Raises:
        RuntimeError: the kernels read a parameter in a form that is not known here.
    """
    parameters = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    derived: list[DerivedCopy] = [*packed_heads(model), *absorbed_projections(model), *sink_copies(model)]
    copied = {copy.parameter for copy in derived}
    if record is None:
        return Regions([], [], derived)
    regions: list[SinkRegion] = []
    places: list[Region] = []
    orders: dict[tuple[object, ...], Tensor] = {}

    def is_plain(name: str) -> bool:
        if name not in parameters or parameters[name].data_ptr() != record.addresses[name]:
            return False
        return parameters[name].stride() == record.strides.get(name, parameters[name].stride())

    for copy in record.copies:
        name = copy.local.name
        is_fp8 = copy.dtype.itemsize == 1 or name.endswith(SCALE_SUFFIX)
        if is_fp8 and (kernel := unknown_kernel(model, name)) is not None:
            raise RuntimeError(
                f"vLLM computes with {name} by {kernel}, which is not known to read FP8 values as they were loaded"
            )
        if is_plain(name):
            places.append(PlainRegion(region_view(parameters[name].detach(), copy)))
            kind: RegionKind = "derived" if name.removesuffix(SCALE_SUFFIX) in copied else "plain"
            regions.append(SinkRegion(Placement(copy.hf, copy.local), kind, copy.dtype))
            continue
        owner = parameters.get(name)
        if owner is None or tuple(owner.shape) != record.shapes[name] or not _is_packed_expert(model, name):
            raise _unknown_form(name)
        for part in by_expert(copy):
            places.append(_permuted(owner.detach(), part, model, orders))
            regions.append(SinkRegion(Placement(part.hf, part.local), "permuted", part.dtype))
    for box in record.zeros:
        if not is_plain(box.name):
            raise _unknown_form(box.name)
        derived.append(Zeros(box.name, parameters[box.name].detach()[box.index]))
    return Regions(regions, places, derived)


def _unknown_form(name: str) -> RuntimeError:
    return RuntimeError(f"vLLM keeps {name} in an unknown form, so a sync cannot write it")


def by_expert(copy: RecordedCopy) -> list[RecordedCopy]:
    """Split a copy into a stack of experts [E, R, C] into one copy per expert, because each expert is packed alone."""
    if copy.local.shape[0] == 1:
        return [copy]
    along = copy.along.index(0)  # the dimension of the checkpoint's tensor that counts experts
    return [
        RecordedCopy(
            _narrow(copy.hf, along, i),
            _narrow(copy.local, 0, i),
            (*copy.along[:along], -1, *copy.along[along + 1 :]),
            copy.dtype,
        )
        for i in range(copy.local.shape[0])
    ]


def _narrow(box: TensorSlice, dim: int, index: int) -> TensorSlice:
    """Return the part of a slice at one index of a dimension."""
    offsets, shape = list(box.offsets), list(box.shape)
    offsets[dim], shape[dim] = offsets[dim] + index, 1
    return TensorSlice(box.name, tuple(offsets), tuple(shape))


def absorbed_projections(model: nn.Module) -> list[AbsorbedProjection]:
    """Return one entry for each layer of latent attention."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        AbsorbedProjection(names[id(module.kv_b_proj.weight)], module, module.W_UV.dtype)  # type: ignore[union-attr, arg-type]
        for module in model.modules()
        if isinstance(getattr(module, "W_UV", None), Tensor)
    ]


def _is_packed_expert(model: nn.Module, parameter: str) -> bool:
    """Return True for a stack of experts [E, R, C] that vLLM's CPU kernel packs expert by expert."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    module = model.get_submodule(parameter.rpartition(".")[0])
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    return isinstance(getattr(kernel, "fused_experts", None), CPUUnquantizedExperts)


def _permuted(owner: Tensor, copy: RecordedCopy, model: nn.Module, orders: dict[tuple[object, ...], Tensor]) -> Region:
    """Return the region of one expert; the first dimension of the stack counts experts."""
    experts: Any = model.get_submodule(copy.local.name.rpartition(".")[0])
    isa = experts.quant_method.moe_kernel.fused_experts.isa
    rows, columns = owner.shape[1:]
    key = (rows, columns, owner.dtype, isa)
    if key not in orders:
        orders[key] = packed_order(rows, columns, owner.dtype, isa)
    whole = RecordedCopy(
        copy.hf, TensorSlice("", (0, *copy.local.offsets[1:]), copy.local.shape), copy.along, copy.dtype
    )
    return PermutedRegion(owner, copy.local.offsets[0] * rows * columns, region_view(orders[key][None], whole))


def packed_order(rows: int, columns: int, dtype: torch.dtype, isa: str) -> Tensor:
    """Return the position [rows, columns] of each element of one expert after the kernel packed it.

    The function packs the base-128 digits of the element indices, which are small enough to be exact in `dtype`.
    """
    from vllm._custom_ops import cpu_prepack_moe_weight

    numbers = torch.arange(rows * columns).view(1, rows, columns)
    found = torch.zeros(rows * columns, dtype=torch.int64)
    for shift in range(0, max(1, (rows * columns - 1).bit_length()), 7):
        digits = (numbers >> shift) & 127
        found |= cpu_prepack_moe_weight(digits.to(dtype), isa).view(-1).to(torch.int64) << shift
    order = torch.empty_like(found)
    order[found] = torch.arange(rows * columns)
    assert torch.equal(found.sort().values, numbers.view(-1)), "packing is not a permutation"
    return order.view(rows, columns)


def packed_heads(model: nn.Module) -> list[PackedHead]:
    """Return the heads that compute logits from a packed copy.

    Raises:
        RuntimeError: vLLM packed another layer and dropped its plain weight.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, PackedHead] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kernel = getattr(module, "cpu_linear", None)
        weight = getattr(module, "weight", None)
        if kernel is None or kernel is nn.functional.linear or weight is None:
            continue
        if id(weight) not in names or not weight.numel():
            raise RuntimeError(f"vLLM packed the weight of {name} and dropped the plain one; it cannot be written")
        if name.rpartition(".")[2] == "lm_head":
            found[names[id(weight)]] = PackedHead(names[id(weight)], module)
    return list(found.values())

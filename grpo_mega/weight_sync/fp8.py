"""FP8 rollouts: the policy's matrices as e4m3 codes and scales, made by the sender before anything travels.

`Fp8Source` shows another `WeightSource` as the FP8 checkpoint of its weights, which the loaders of FP8 engines read: a
matrix `X.weight` is codes, and `X.weight_scale_inv` has one fp32 scale for each 128 x 128 block. So plan, transports
and proof treat codes and scales as any other tensors, and one byte travels where bf16 has two. Embedding, head, norms,
biases and routers stay as they are.

Scales are made anew for every push, from all slices of a block that the rank holds: a fused projection may cut one.
Codes are made piece by piece, when a bucket is packed, and never exist whole. A block that no rank holds whole is
refused instead of exchanging its amax: engines refuse such a split too, their kernels take whole blocks.
Pure of engines; asserted by tests/unit/test_sync_fp8.py: bit-equal to quantising whole tensors that have arrived.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.convert.fp8 import BLOCK, SCALE_SUFFIX, codes_of, dequantise, scales_of
from grpo_mega.interfaces import HeldSlice, WeightSource
from grpo_mega.types import TensorSlice, UserError, WeightMismatchError
from grpo_mega.weight_sync.verify import parts_of

_KEPT = ("norm", "embed", "lm_head", "router", ".gate.weight")


def is_coded(name: str, shape: tuple[int, ...]) -> bool:
    """Does an FP8 engine compute with codes of this tensor? Matrices of projections, shared and routed experts."""
    return len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in _KEPT)


def fp8_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of the FP8 checkpoint, each scale behind its codes."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        found[name] = shape
        if is_coded(name, shape):
            found[name + SCALE_SUFFIX] = tuple(-(-size // BLOCK) for size in shape)
    return found


@dataclass(frozen=True, kw_only=True)
class CodedSlice(HeldSlice):
    """A slice of a matrix, of which parts are quantised when they are asked for. `scales`: of the whole matrix; right
    where this rank holds the block."""

    scales: Tensor

    def part(self, hf: TensorSlice) -> Tensor:
        """Codes of the values rounded to bfloat16, which is what would travel without FP8."""
        return codes_of(super().part(hf).bfloat16(), self.scales, hf.offsets)


class Fp8Source:
    """`WeightSource` of the FP8 checkpoint of another source's weights."""

    def __init__(self, source: WeightSource, *, power_of_two: bool) -> None:
        """`power_of_two`: of the scales, as some kernels need them; else they are any fp32 numbers."""
        self._source, self._power_of_two = source, power_of_two
        self._shapes = source.hf_shapes()

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return fp8_shapes(self._shapes)

    def shards(self) -> Sequence[HeldSlice]:
        """Codes and scales of the weights as they are now.

        Raises:
            UserError: a block is not whole on this rank (names tensor and block).
            WeightMismatchError: a weight is not finite.
        """
        held: dict[str, list[HeldSlice]] = defaultdict(list)
        for each in self._source.shards():
            held[each.hf.name].append(each)
        found: list[HeldSlice] = []
        for name, slices in held.items():
            if not is_coded(name, self._shapes[name]):
                found += slices
                continue
            whole, scales = self._scales(name, slices)
            found += [
                CodedSlice(hf=s.hf, global_shape=s.global_shape, view=s.view, counted=s.counted, scales=scales)
                for s in slices
            ]
            found += _scale_slices(name + SCALE_SUFFIX, slices, whole, scales)
        return found

    def _scales(self, name: str, slices: Sequence[HeldSlice]) -> tuple[Tensor, Tensor]:
        """(which blocks are here, scales), both [ceil(R / 128), ceil(C / 128)]."""
        shape = self._shapes[name]
        grid = tuple(-(-size // BLOCK) for size in shape)
        device = slices[0].view.device
        amax, filled = torch.zeros(grid, device=device), torch.zeros(grid, dtype=torch.int64, device=device)
        for each in slices:
            for hf in parts_of(each.hf):
                box, found = _block_amax(HeldSlice.part(each, hf).bfloat16(), hf)
                amax[box] = torch.maximum(amax[box], found)
                rows, columns = (_elements(o, n, device) for o, n in zip(hf.offsets, hf.shape, strict=True))
                filled[box] += rows[:, None] * columns
        whole = filled == _elements(0, shape[0], device)[:, None] * _elements(0, shape[1], device)
        if not torch.equal(whole, filled > 0):
            row, column = torch.nonzero(whole != (filled > 0))[0].tolist()
            raise UserError(
                f"FP8 rollouts: of the {BLOCK} x {BLOCK} block of {name} at [{row * BLOCK}, {column * BLOCK}] this "
                f"rank of the policy holds {int(filled[row, column])} elements; a block must be whole on a rank: use a "
                "smaller parallel.tp or parallel.etp"
            )
        if not bool(torch.isfinite(amax).all()):
            raise WeightMismatchError(f"{name} has a value that is not finite: it has no FP8 code")
        return whole, scales_of(amax, power_of_two=self._power_of_two)


def _block_amax(values: Tensor, hf: TensorSlice) -> tuple[tuple[slice, slice], Tensor]:
    """(blocks that the slice touches, amax of its part of each)."""
    before = [offset % BLOCK for offset in hf.offsets]
    after = [-(o + n) % BLOCK for o, n in zip(hf.offsets, hf.shape, strict=True)]
    padded = torch.nn.functional.pad(values.abs(), (before[1], after[1], before[0], after[0]))
    found = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK).amax((1, 3)).float()
    first = [offset // BLOCK for offset in hf.offsets]
    return (slice(first[0], first[0] + found.shape[0]), slice(first[1], first[1] + found.shape[1])), found


def _elements(offset: int, size: int, device: torch.device) -> Tensor:
    """How much of [offset : offset + size] lies in each block that it touches."""
    first, end = offset // BLOCK * BLOCK, offset + size
    edges = range(first, end, BLOCK)
    return torch.tensor([min(end, edge + BLOCK) - max(offset, edge) for edge in edges], device=device)


def _scale_slices(name: str, slices: Sequence[HeldSlice], whole: Tensor, scales: Tensor) -> list[HeldSlice]:
    """The boxes of scales that belong to the slices, each block in one of them; counted where the slice is that begins
    it."""
    found = []
    taken = torch.zeros_like(whole)
    for each in slices:
        low = [offset // BLOCK for offset in each.hf.offsets]
        high = [-(-(o + n) // BLOCK) for o, n in zip(each.hf.offsets, each.hf.shape, strict=True)]
        # slices cut blocks in rows: the block that an earlier slice began is its own
        while low[0] < high[0] and bool(taken[low[0], low[1]]):
            low[0] += 1
        while low[0] < high[0] and bool(taken[high[0] - 1, low[1]]):
            high[0] -= 1
        if low[0] == high[0]:
            continue
        box = (slice(low[0], high[0]), slice(low[1], high[1]))
        taken[box] = True
        hf = TensorSlice(name, (low[0], low[1]), (high[0] - low[0], high[1] - low[1]))
        found.append(HeldSlice(hf, tuple(scales.shape), scales[box], each.counted))
    assert torch.equal(taken, whole), f"{name}: slices that share blocks in rows and in columns"
    return found


def fp8_report(
    source: WeightSource, group: dist.ProcessGroup | None, *, power_of_two: bool
) -> dict[str, dict[str, float]]:
    """What FP8 does to each layer: matrix -> `relative` |W - q(W)| / |W| (Frobenius) and `largest` |w - q(w)|.

    Args:
        source: the policy's, in its own dtype.
        group: the ranks that hold one copy of the policy; None: this rank alone.
        power_of_two: as in `Fp8Source`.
    """
    names = [name for name, shape in source.hf_shapes().items() if is_coded(name, shape)]
    place = {name: i for i, name in enumerate(names)}
    sums, largest = torch.zeros(len(names), 2, dtype=torch.float64), torch.zeros(len(names), dtype=torch.float64)
    for held in Fp8Source(source, power_of_two=power_of_two).shards():
        if not isinstance(held, CodedSlice) or not held.counted:
            continue
        for hf in parts_of(held.hf):
            values = HeldSlice.part(held, hf).bfloat16().double()
            error = dequantise(held.part(hf), held.scales, hf.offsets).double() - values
            i = place[hf.name]
            sums[i] += torch.stack([error.square().sum(), values.square().sum()]).cpu()
            largest[i] = max(float(largest[i]), float(error.abs().amax()))
    if group is not None and group.size() > 1:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return {
        name: {"relative": math.sqrt(sums[i, 0] / sums[i, 1]) if sums[i, 1] else 0.0, "largest": float(largest[i])}
        for name, i in place.items()
    }

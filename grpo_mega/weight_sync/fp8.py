"""FP8 rollouts: the policy's matrices as e4m3 codes and scales, made by the sender before anything travels.

`Fp8Source` shows another `WeightSource` as the FP8 checkpoint of its weights (quantization/fp8_checkpoint.py), which
the loaders of FP8 engines read. So plan, transports and proof treat codes and scales as any other tensors, and one byte
travels where bf16 has two.

Scales are made anew for every push, from all slices of a block that the rank holds: a fused projection may cut one.
Codes are made piece by piece, when a bucket is packed, and never exist whole. A block that no rank holds whole is
refused instead of exchanging its amax: engines refuse such a split too, their kernels take whole blocks.
Pure of engines; asserted by tests/unit/weight_sync/test_fp8.py and, between real ranks,
tests/parallel/test_sync_fp8_ranks.py: bit-equal to quantising whole tensors that have arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mega.interfaces import HeldSlice, WeightSource
from grpo_mega.quantization.block_fp8 import CODE, codes_of, quantise, scales_of
from grpo_mega.quantization.fp8_checkpoint import BLOCK, SCALE_SUFFIX, fp8_shapes, is_coded, scale_slices, scales_shape
from grpo_mega.types import TensorSlice, WeightMismatchError
from grpo_mega.weight_sync.sync import FullTensors
from grpo_mega.weight_sync.verify import parts_of


@dataclass(frozen=True, kw_only=True)
class CodedSlice(HeldSlice):
    """A slice of a matrix, of which parts are quantised when they are asked for. `scales`: of the whole matrix; right
    where this rank holds the block."""

    scales: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return CODE

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        return None

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
        slices = list(self._source.shards())
        scales = self._scales(slices)
        found: list[HeldSlice] = [
            CodedSlice(hf=s.hf, global_shape=s.global_shape, view=s.view, counted=s.counted, scales=scales[s.hf.name])
            if s.hf.name in scales
            else s
            for s in slices
        ]
        for i, hf in scale_slices(self._shapes, [s.hf for s in slices]):
            whole = scales[slices[i].hf.name]
            found.append(HeldSlice(hf, tuple(whole.shape), whole[hf.index], slices[i].counted))
        return found

    def _scales(self, slices: Sequence[HeldSlice]) -> dict[str, Tensor]:
        """Of every matrix that is coded, [ceil(R / 128), ceil(C / 128)]; right where this rank holds the block."""
        amaxes: dict[str, Tensor] = {}
        for held in slices:
            name = held.hf.name
            if not is_coded(name, self._shapes[name]):
                continue
            grid = scales_shape(self._shapes[name])
            amax = amaxes.setdefault(name, torch.zeros(grid, device=held.view.device))
            for hf in parts_of(held.hf):
                box, found = _block_amax(held.part(hf).bfloat16(), hf)
                amax[box] = torch.maximum(amax[box], found)
        for name, amax in amaxes.items():
            if not bool(torch.isfinite(amax).all()):
                raise WeightMismatchError(f"{name} has a value that is not finite: it has no FP8 code")
        return {name: scales_of(amax, power_of_two=self._power_of_two) for name, amax in amaxes.items()}


def fp8_tensors(full_tensors: FullTensors, *, power_of_two: bool) -> FullTensors:
    """Whole tensors of the FP8 checkpoint, for an engine that is streamed to: codes and scales as `Fp8Source` has
    them."""

    def coded(bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        for name, values in full_tensors(bucket_bytes):
            if not is_coded(name, tuple(values.shape)):
                yield name, values
                continue
            codes, scales = quantise(values.bfloat16(), power_of_two=power_of_two)
            yield name, codes
            yield name + SCALE_SUFFIX, scales

    return coded


def _block_amax(values: Tensor, hf: TensorSlice) -> tuple[tuple[slice, slice], Tensor]:
    """(blocks that the slice touches, amax of its part of each)."""
    before = [offset % BLOCK for offset in hf.offsets]
    after = [-(o + n) % BLOCK for o, n in zip(hf.offsets, hf.shape, strict=True)]
    padded = torch.nn.functional.pad(values.abs(), (before[1], after[1], before[0], after[0]))
    found = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK).amax((1, 3)).float()
    first = [offset // BLOCK for offset in hf.offsets]
    return (slice(first[0], first[0] + found.shape[0]), slice(first[1], first[1] + found.shape[1])), found

"""FP8 rollouts: the sender quantizes the policy's matrices to e4m3 values and scales before anything is sent.

`Fp8Source` presents another `WeightSource` as the FP8 checkpoint of its weights (quantization/fp8_checkpoint.py), which
the loaders of FP8 engines read. Plan, transports and verification treat quantized values and scales like any other
tensors. One byte is sent where bf16 needs two.

Scales are computed for every push, from all slices of a block that the rank holds; a fused projection may split a block
into several slices. Values are quantized piece by piece when a bucket is packed, so a quantized matrix never exists
whole. A block that no rank holds whole is rejected, instead of exchanging its largest magnitude. Engines reject such a
layout too, because their kernels take whole blocks.

Independent of engines. Asserted by tests/unit/weight_sync/test_fp8.py and, between real ranks, by
tests/parallel/test_sync_fp8_ranks.py: bit-equal to quantizing whole tensors after the transfer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mega.interfaces import HeldSlice, WeightSource
from grpo_mega.models.fp8_tensors import is_quantized, scales_shape
from grpo_mega.quantization.block_fp8 import FP8_DTYPE, block_scales, quantize, to_fp8
from grpo_mega.quantization.fp8_checkpoint import BLOCK, SCALE_SUFFIX, fp8_shapes, scale_slices
from grpo_mega.types import TensorSlice, WeightMismatchError
from grpo_mega.weight_sync.digest_comparison import parts_of
from grpo_mega.weight_sync.sync import FullTensors


@dataclass(frozen=True, kw_only=True)
class QuantizedSlice(HeldSlice):
    """A slice of a matrix whose parts are quantized on access.

    `scales`: [ceil(R / 128), ceil(C / 128)] of the whole matrix; valid for the blocks that this rank holds.
    """

    scales: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The FP8 dtype."""
        return FP8_DTYPE

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        """Return None, whatever the shape of `hf`: `part` computes the values."""
        return None

    def part(self, hf: TensorSlice) -> Tensor:
        """Return the quantized values of `hf`, shaped `hf.shape`.

        They are rounded to bfloat16 first, the dtype that is sent without FP8.
        """
        return to_fp8(super().part(hf).bfloat16(), self.scales, hf.offsets)


class Fp8Source:
    """`WeightSource` that presents another source's weights as an FP8 checkpoint."""

    def __init__(self, source: WeightSource, *, power_of_two: bool) -> None:
        """Present the weights of `source`, without computing anything yet.

        Args:
            source: the policy's weights.
            power_of_two: round scales up to powers of two, as some kernels need; False: scales are any fp32 numbers.
        """
        self._source, self._power_of_two = source, power_of_two
        self._shapes = source.hf_shapes()

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every tensor of the FP8 checkpoint, in checkpoint order."""
        return fp8_shapes(self._shapes)

    def shards(self) -> Sequence[HeldSlice]:
        """Return quantized values and scales of the present weights.

        Raises:
            UserError: this rank holds only a part of a block (names tensor and block).
            WeightMismatchError: a weight is not finite.
        """
        slices = list(self._source.shards())
        scales = self._scales(slices)
        found: list[HeldSlice] = [
            QuantizedSlice(
                hf=s.hf, global_shape=s.global_shape, view=s.view, counted=s.counted, scales=scales[s.hf.name]
            )
            if s.hf.name in scales
            else s
            for s in slices
        ]
        for i, hf in scale_slices(self._shapes, [s.hf for s in slices]):
            whole = scales[slices[i].hf.name]
            found.append(HeldSlice(hf, tuple(whole.shape), whole[hf.index], slices[i].counted))
        return found

    def _scales(self, slices: Sequence[HeldSlice]) -> dict[str, Tensor]:
        """Return the scales of every quantized matrix: [ceil(R / 128), ceil(C / 128)], valid where this rank holds the
        block."""
        amaxes: dict[str, Tensor] = {}
        for held in slices:
            name = held.hf.name
            if not is_quantized(name, self._shapes[name]):
                continue
            grid = scales_shape(self._shapes[name])
            amax = amaxes.setdefault(name, torch.zeros(grid, device=held.view.device))
            for hf in parts_of(held.hf):
                blocks, found = _block_amax(held.part(hf).bfloat16(), hf)
                amax[blocks] = torch.maximum(amax[blocks], found)
        for name, amax in amaxes.items():
            if not bool(torch.isfinite(amax).all()):
                raise WeightMismatchError(f"{name} has a value that is not finite and cannot be quantized to FP8")
        return {name: block_scales(amax, power_of_two=self._power_of_two) for name, amax in amaxes.items()}


def fp8_tensors(full_tensors: FullTensors, *, power_of_two: bool) -> FullTensors:
    """Return a function that yields the whole tensors of the FP8 checkpoint, for engines that do not support slices.

    Quantized values and scales are equal to those of `Fp8Source`.
    """

    def quantized_tensors(bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        for name, values in full_tensors(bucket_bytes):
            if not is_quantized(name, tuple(values.shape)):
                yield name, values
                continue
            codes, scales = quantize(values.bfloat16(), power_of_two=power_of_two)
            yield name, codes
            yield name + SCALE_SUFFIX, scales

    return quantized_tensors


def _block_amax(values: Tensor, hf: TensorSlice) -> tuple[tuple[slice, slice], Tensor]:
    """Return (index of the blocks that the slice overlaps, largest magnitude of the slice's part of each block)."""
    before = [offset % BLOCK for offset in hf.offsets]
    after = [-(o + n) % BLOCK for o, n in zip(hf.offsets, hf.shape, strict=True)]
    padded = torch.nn.functional.pad(values.abs(), (before[1], after[1], before[0], after[0]))
    found = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK).amax((1, 3)).float()
    first = [offset // BLOCK for offset in hf.offsets]
    return (slice(first[0], first[0] + found.shape[0]), slice(first[1], first[1] + found.shape[1])), found

"""Block-scaled FP8 weights: float8_e4m3fn values with one float32 scale for each 128 x 128 block.

value = quantized value * scale, rounded to bfloat16. The scale of a block cannot be computed back from its values:
bfloat16 keeps 8 bits of amax = 448 * scale, and the largest quantized value of a block may be below 448. `quantize`
therefore takes the scales that the checkpoint was read with. It keeps each scale that reproduces its block exactly. An
unchanged block gets its quantized values back bit for bit: rounding to bfloat16 moves a product by at most 2^-9 of it,
and a quantized value changes only beyond 2^-5. A trained block gets scale = amax / 448.
This holds for every FP8 value except NaN and for scales in bfloat16's normal range.
Asserted by tests/unit/quantization/test_block_fp8.py.
Source: DeepSeek-V3, arXiv:2412.19437, section 3.3.2 (128 x 128 blocks of weights, amax to the largest e4m3 value).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.models.fp8_tensors import scales_shape
from grpo_mega.quantization.fp8_checkpoint import BLOCK as BLOCK
from grpo_mega.quantization.fp8_checkpoint import SCALE_SUFFIX as SCALE_SUFFIX
from grpo_mega.types import UserError

SCALE = ".weight" + SCALE_SUFFIX
FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0


def dequantize(codes: Tensor, scales: Tensor, offsets: tuple[int, ...] = (0, 0)) -> Tensor:
    """Return the values [r, c] bfloat16 of the quantized slice [r, c] that starts at `offsets` of the weight.

    Args:
        codes: [r, c] float8_e4m3fn, the quantized values.
        scales: [ceil(R / 128), ceil(C / 128)] float32 of the whole weight [R, C].
    """
    return (codes.float() * _spread(scales, tuple(codes.shape), offsets)).to(torch.bfloat16)


def quantize(values: Tensor, stored: Tensor | None = None, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Return quantized values [R, C] and scales [ceil(R / 128), ceil(C / 128)] of a weight.

    The weight is whole, or its rows start at a multiple of 128.

    Args:
        values: [R, C] bfloat16 or float32.
        stored: the scales with which the weight was read; each is kept if it reproduces the values of its block.
        power_of_two: see `block_scales`.
    Raises:
        UserError: a value is not finite, or `stored` has another shape.
    """
    rows, columns = values.shape
    grid = scales_shape((rows, columns))
    if stored is not None and tuple(stored.shape) != grid:
        raise UserError(
            f"the stored scales have shape {tuple(stored.shape)}, but {tuple(values.shape)} values need {grid}"
        )
    amax = _blocks(values.abs().float()).amax((1, 3))
    if not bool(torch.isfinite(amax).all()):
        raise UserError("a weight is not finite and cannot be quantized", remedy="write the checkpoint in bfloat16")
    scales = block_scales(amax, power_of_two=power_of_two)
    codes = to_fp8(values, scales)
    if stored is None:
        return codes, scales
    kept = to_fp8(values, stored)
    back = dequantize(kept, stored).to(values.dtype)
    # compared by bits, because a negative zero differs from zero
    same = _blocks((_bits(back) == _bits(values)).float()).amin((1, 3)) > 0
    scales = torch.where(same, stored, scales)
    chosen = _spread(same.float(), (rows, columns), (0, 0)) > 0
    return torch.where(chosen, kept.view(torch.uint8), codes.view(torch.uint8)).view(FP8_DTYPE), scales


def block_scales(amax: Tensor, *, power_of_two: bool = False) -> Tensor:
    """Return the scales amax / 448, or the smallest powers of two that are not smaller.

    A block of zeros can have any scale; it gets 1, so that the division is defined.
    """
    scales = torch.where(amax > 0, amax / FP8_MAX, 1.0)
    if not power_of_two:
        return scales
    fraction, exponent = torch.frexp(scales)  # fraction in [0.5, 1)
    return torch.ldexp(torch.ones_like(scales), exponent - (fraction == 0.5).int())


def to_fp8(values: Tensor, scales: Tensor, offsets: tuple[int, ...] = (0, 0)) -> Tensor:
    """Return the quantized slice [r, c] that starts at `offsets` of a weight with these scales."""
    divisors = _spread(scales, tuple(values.shape), offsets)
    # some checkpoints give a block of zeros the scale 0; 0 / 0 would be NaN
    scaled = values.float() / torch.where(divisors == 0, 1.0, divisors)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)


def _blocks(values: Tensor) -> Tensor:
    """Return [R, C] as [R / 128, 128, C / 128, 128]; incomplete blocks are padded with their last value."""
    rows, columns = values.shape
    below, right = -rows % BLOCK, -columns % BLOCK
    if below or right:
        values = torch.nn.functional.pad(values[None, None], (0, right, 0, below), mode="replicate")[0, 0]
    return values.view(values.shape[0] // BLOCK, BLOCK, values.shape[1] // BLOCK, BLOCK)


def _spread(scales: Tensor, shape: tuple[int, ...], offsets: tuple[int, ...]) -> Tensor:
    """Return the scale of each element, [r, c]."""
    rows = torch.arange(offsets[0], offsets[0] + shape[0], device=scales.device) // BLOCK
    columns = torch.arange(offsets[1], offsets[1] + shape[1], device=scales.device) // BLOCK
    return scales[rows][:, columns]


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32}[values.itemsize])

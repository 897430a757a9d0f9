"""Block-scaled FP8 weights: float8_e4m3fn codes with one float32 scale for each 128 x 128 block.

value = code * scale, rounded to bfloat16. The scale of a block cannot be computed back from its values: bfloat16 keeps
8 bits of amax = 448 * scale, and a block whose largest code is not 448 says even less. `quantise` therefore takes the
scales that the checkpoint was read with, and keeps each one that reproduces its block exactly: for an unchanged block
the codes come back bit for bit, because the rounding to bfloat16 moves code * scale by at most 2^-9 of it, and a code
is only left at 2^-5. A block that was trained gets scale = amax / 448.
Every code but NaN, for scales in bfloat16's normal range: asserted by tests/unit/quantization/test_block_fp8.py.
Source: DeepSeek-V3, arXiv:2412.19437, section 3.3.2 (128 x 128 blocks of weights, amax to the largest e4m3 value).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.quantization.fp8_checkpoint import BLOCK as BLOCK
from grpo_mega.quantization.fp8_checkpoint import SCALE_SUFFIX as SCALE_SUFFIX
from grpo_mega.quantization.fp8_checkpoint import scales_shape
from grpo_mega.types import UserError

SCALE = ".weight" + SCALE_SUFFIX
CODE = torch.float8_e4m3fn
MAX_CODE = 448.0


def dequantise(codes: Tensor, scales: Tensor, offsets: tuple[int, ...] = (0, 0)) -> Tensor:
    """Values [r, c] bfloat16 of the box of codes [r, c] that starts at `offsets` of the weight.

    Args:
        codes: [r, c] float8_e4m3fn.
        scales: [ceil(R / 128), ceil(C / 128)] float32 of the whole weight [R, C].
    """
    return (codes.float() * _spread(scales, tuple(codes.shape), offsets)).to(torch.bfloat16)


def quantise(values: Tensor, stored: Tensor | None = None, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes [R, C] and scales [ceil(R / 128), ceil(C / 128)] of a whole weight, or of rows from a multiple of 128.

    Args:
        values: [R, C] bfloat16 or float32.
        stored: the scales that the weight once was read with; kept where they reproduce the block's values.
        power_of_two: see `scales_of`.
    Raises:
        UserError: a value is not finite, or `stored` has another shape.
    """
    rows, columns = values.shape
    grid = scales_shape((rows, columns))
    if stored is not None and tuple(stored.shape) != grid:
        raise UserError(f"the stored scales have shape {tuple(stored.shape)}, {tuple(values.shape)} values need {grid}")
    amax = _blocks(values.abs().float()).amax((1, 3))
    if not bool(torch.isfinite(amax).all()):
        raise UserError("a weight is not finite and has no FP8 code", remedy="write the checkpoint in bfloat16")
    scales = scales_of(amax, power_of_two=power_of_two)
    codes = codes_of(values, scales)
    if stored is None:
        return codes, scales
    kept = codes_of(values, stored)
    back = dequantise(kept, stored).to(values.dtype)
    # compared by bits: a negative zero is a value of its own
    same = _blocks((_bits(back) == _bits(values)).float()).amin((1, 3)) > 0
    scales = torch.where(same, stored, scales)
    chosen = _spread(same.float(), (rows, columns), (0, 0)) > 0
    return torch.where(chosen, kept.view(torch.uint8), codes.view(torch.uint8)).view(CODE), scales


def scales_of(amax: Tensor, *, power_of_two: bool = False) -> Tensor:
    """Scales amax / 448, or the least powers of two that are not below.

    A block of zeros has any scale; 1 keeps the division defined.
    """
    scales = torch.where(amax > 0, amax / MAX_CODE, 1.0)
    if not power_of_two:
        return scales
    fraction, exponent = torch.frexp(scales)  # fraction in [0.5, 1)
    return torch.ldexp(torch.ones_like(scales), exponent - (fraction == 0.5).int())


def codes_of(values: Tensor, scales: Tensor, offsets: tuple[int, ...] = (0, 0)) -> Tensor:
    """Codes [r, c] of the box of values [r, c] that starts at `offsets` of a weight with these scales."""
    divisors = _spread(scales, tuple(values.shape), offsets)
    # some makers give a block of zeros the scale 0; 0 / 0 would be no code
    scaled = values.float() / torch.where(divisors == 0, 1.0, divisors)
    return scaled.clamp(-MAX_CODE, MAX_CODE).to(CODE)


def _blocks(values: Tensor) -> Tensor:
    """[R, C] -> [R / 128, 128, C / 128, 128]; incomplete blocks repeat nothing and are filled with their last value."""
    rows, columns = values.shape
    below, right = -rows % BLOCK, -columns % BLOCK
    if below or right:
        values = torch.nn.functional.pad(values[None, None], (0, right, 0, below), mode="replicate")[0, 0]
    return values.view(values.shape[0] // BLOCK, BLOCK, values.shape[1] // BLOCK, BLOCK)


def _spread(scales: Tensor, shape: tuple[int, ...], offsets: tuple[int, ...]) -> Tensor:
    """Each element's scale, [r, c]."""
    rows = torch.arange(offsets[0], offsets[0] + shape[0], device=scales.device) // BLOCK
    columns = torch.arange(offsets[1], offsets[1] + shape[1], device=scales.device) // BLOCK
    return scales[rows][:, columns]


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32}[values.itemsize])

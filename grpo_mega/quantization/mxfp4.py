"""MXFP4 weights of experts, the format of gpt-oss: two e2m1 values in a byte, one power of two for 32 of them.

The values X[e, k, n] of the weight that `transformers` calls `X` are stored as `X_blocks` [E, N, K / 32, 16] uint8,
whose byte j of a block holds elements 2j (low half) and 2j + 1, and `X_scales` [E, N, K / 32] uint8, the exponent
plus 127:

    X[e, 32 g + i, n] = CODES[code(e, n, g, i)] * 2^(scales[e, n, g] - 127)

Every value is exact in bfloat16. The format is only read; trained weights are written as bfloat16.
Asserted by tests/unit/quantization/test_mxfp4.py against `transformers`.
Source: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 (e2m1) and 5.4.1 (e8m0).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"
BLOCK = 32
_BYTES = BLOCK // 2
_BIAS = 127
CODES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def shape_of(blocks: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Return the shape [E, K, N] of the weight, or None if the two shapes do not match."""
    if len(blocks) != 4 or blocks[3] != _BYTES or blocks[:3] != scales:
        return None
    experts, columns, groups, _ = blocks
    return experts, groups * BLOCK, columns


def groups_of(offset: int, length: int) -> tuple[int, int]:
    """Return the first block and the number of blocks that hold `length` elements along K from `offset`."""
    first = offset // BLOCK
    return first, math.ceil((offset + length) / BLOCK) - first


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the values [e, g * 32, n] bfloat16 of blocks [e, n, g, 16] and scales [e, n, g]."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    values = torch.ldexp(CODES[codes.int()], scales.int().unsqueeze(-1) - _BIAS)
    return values.to(torch.bfloat16).flatten(-2).transpose(1, 2)

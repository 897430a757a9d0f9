"""Which tensors of a model an FP8 engine quantizes, and the shape of their scales. Pure rules on names and shapes.

Asserted by tests/unit/weight_sync/test_fp8.py.
"""

from __future__ import annotations

from grpo_mega.models.spec import FP8_BLOCK

SCALE_BYTES = 4
"""Bytes of the scale of one block of FP8 values."""

_KEPT = ("norm", "embed", "lm_head", "router", ".gate.weight")

Shape = tuple[int, ...]


def is_quantized(name: str, shape: Shape) -> bool:
    """Return True if an FP8 engine quantizes this tensor: matrices of projections, shared and routed experts."""
    return len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in _KEPT)


def scales_shape(shape: Shape) -> Shape:
    """Return the shape of the scales, one for each block: [ceil(R / 128), ceil(C / 128)]."""
    return tuple(-(-size // FP8_BLOCK) for size in shape)

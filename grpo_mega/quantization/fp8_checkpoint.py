"""Contents of the FP8 checkpoint of a model: its quantized weights, the scales of a slice, and its config.

Names and shapes decide: a matrix `X.weight` of a layer has e4m3 values, and `X.weight_scale_inv` has one float32 scale
for each 128 x 128 block. Embedding, head, norms, biases and routers are not quantized.
Asserted by tests/unit/weight_sync/test_fp8.py. tests/engine/test_vllm_record.py asserts that vLLM's loader reads
exactly these tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_mega.models.fp8_tensors import Shape, is_quantized, scales_shape
from grpo_mega.models.spec import FP8_BLOCK
from grpo_mega.types import TensorSlice, UserError

BLOCK = FP8_BLOCK
SCALE_SUFFIX = "_scale_inv"
FP8_SCHEME: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}


def fp8_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the tensors of the FP8 checkpoint; the scales of a weight follow it."""
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        found[name] = shape
        if is_quantized(name, shape):
            found[name + SCALE_SUFFIX] = scales_shape(shape)
    return found


def quantization_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json.

    It lists the layers whose matrix is not quantized. Otherwise a loader would expect quantized values for every linear
    layer, also for routers.
    """
    kept = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not is_quantized(name, shape)
    ]
    return FP8_SCHEME | {"modules_to_not_convert": kept}


def scale_slices(shapes: Mapping[str, Shape], slices: Sequence[TensorSlice]) -> Iterator[tuple[int, TensorSlice]]:
    """Yield (i, a slice of scales) for the slices of one rank; a block belongs to the slice i that begins it.

    Args:
        shapes: shapes of the tensors without FP8.
        slices: all slices on the rank, each element once.

    Raises:
        UserError: the rank holds a part of a block; the message names tensor and block.
    """
    by_name: dict[str, list[int]] = defaultdict(list)
    for i, hf in enumerate(slices):
        if is_quantized(hf.name, shapes[hf.name]):
            by_name[hf.name].append(i)
    for name, numbers in by_name.items():
        held = [slices[i] for i in numbers]
        for i, box in _blocks_by_slice(held, _whole_blocks(held, shapes[name])):
            yield numbers[i], TensorSlice(name + SCALE_SUFFIX, *box)


def _whole_blocks(held: Sequence[TensorSlice], shape: Shape) -> NDArray[np.bool_]:
    """Return [ceil(R / 128), ceil(C / 128)] bool: the blocks of one tensor that the rank holds whole."""
    filled = np.zeros(scales_shape(shape), np.int64)
    for hf in held:
        rows, columns = (_elements(o, n) for o, n in zip(hf.offsets, hf.shape, strict=True))
        low = [offset // BLOCK for offset in hf.offsets]
        filled[low[0] : low[0] + len(rows), low[1] : low[1] + len(columns)] += np.outer(rows, columns)
    whole: NDArray[np.bool_] = filled == np.outer(*(_elements(0, size) for size in shape))
    cut = np.argwhere(whole != (filled > 0))
    if len(cut):
        row, column = cut[0].tolist()
        raise UserError(
            f"FP8: of the {BLOCK} x {BLOCK} block of {held[0].name} at [{row * BLOCK}, {column * BLOCK}] a rank "
            f"of the policy holds {filled[row, column]} elements",
            remedy="a block must be whole on a rank: use a smaller "
            "parallel.tp or parallel.etp, or leave engine.fp8 and weight_sync.fp8_report out",
        )
    return whole


def _elements(offset: int, size: int) -> NDArray[np.int64]:
    """Return the number of elements of [offset : offset + size] in each block that it touches."""
    edges = np.arange(offset // BLOCK * BLOCK, offset + size, BLOCK)
    sizes: NDArray[np.int64] = np.minimum(offset + size, edges + BLOCK) - np.maximum(offset, edges)
    return sizes


def _blocks_by_slice(
    held: Sequence[TensorSlice], whole: NDArray[np.bool_]
) -> Iterator[tuple[int, tuple[Shape, Shape]]]:
    """Yield (i, offsets and shape in blocks) of the blocks that slice i begins."""
    taken = np.zeros_like(whole)
    for i, hf in enumerate(held):
        low = [offset // BLOCK for offset in hf.offsets]
        high = [-(-(o + n) // BLOCK) for o, n in zip(hf.offsets, hf.shape, strict=True)]
        # slices divide blocks by rows: a block belongs to the slice that begins it
        while low[0] < high[0] and taken[low[0], low[1]]:
            low[0] += 1
        while low[0] < high[0] and taken[high[0] - 1, low[1]]:
            high[0] -= 1
        if low[0] == high[0]:
            continue
        taken[low[0] : high[0], low[1] : high[1]] = True
        yield i, ((low[0], low[1]), (high[0] - low[0], high[1] - low[1]))
    assert np.array_equal(taken, whole), f"{held[0].name}: slices that share blocks in rows and in columns"

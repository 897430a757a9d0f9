"""Random initial weights of a model, read like the tensors of a checkpoint (`model.init: random`).

A matrix has independent normal values with mean 0 and the standard deviation `initializer_range` of config.json. Norms
are 1 and biases are 0. Source: transformers, `PreTrainedModel._init_weights` and those of the families.
Differs: the row of the padding token is random too.

The values of a tensor are made in blocks of rows, each with a seed of its own, so a rank makes only the blocks of its
slice, and every layout gets the same weights. Asserted by tests/unit/formats/test_random_tensors.py and
tests/parallel/test_random_start.py.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import TensorSlice

_BLOCK_ELEMENTS = 1 << 20


class RandomTensors:
    """The initial weights of a model by their Hugging Face names, float32.

    Args:
        spec: gives the tensors, and the standard deviation of the matrices.
        seed: of the run; it decides all values.
    """

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self._std, self._seed, self._shapes = spec.initializer_range, seed, hf_shapes(spec)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor: float32 for all."""
        del name
        return torch.float32

    def read_into(self, box: TensorSlice, out: Tensor) -> None:
        """Fill `out` with a slice; `out` has its shape and any floating-point dtype."""
        constant = _constant_of(box.name)
        if constant is not None:
            out.fill_(constant)
            return
        shape = self._shapes[box.name]
        row_elements = math.prod(shape[1:])
        step = max(1, _BLOCK_ELEMENTS // row_elements)
        inside = tuple(slice(at, at + size) for at, size in zip(box.offsets[1:], box.shape[1:], strict=True))
        begin, end = box.offsets[0], box.offsets[0] + box.shape[0]
        for block in range(begin // step, -(-end // step)):
            first, last = block * step, min((block + 1) * step, shape[0])
            values = self._block(box.name, block, (last - first, *shape[1:]))
            low, high = max(first, begin), min(last, end)
            out[low - begin : high - begin].copy_(values[low - first : high - first][(slice(None), *inside)])

    def close(self) -> None:
        """Do nothing: no file is open."""

    def _block(self, name: str, block: int, shape: tuple[int, ...]) -> Tensor:
        """Return the rows of a block, whatever part of it is needed."""
        digest = hashlib.sha256(f"{self._seed}/{name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(shape, generator=generator, dtype=torch.float32) * self._std


def _constant_of(name: str) -> float | None:
    """Return the value of all elements of a norm or bias, or None for a tensor with random values."""
    if name.endswith("norm.weight"):
        return 1.0
    if name.endswith(".router.bias"):  # gpt-oss
        return None
    return 0.0 if name.endswith("bias") else None

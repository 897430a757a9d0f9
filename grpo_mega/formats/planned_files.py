"""Plans of output files, made before any tensor is read: their chunks, and the slices that fill each chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grpo_mega.formats.byte_ranges import (
    Shape,
)
from grpo_mega.types import TensorSlice

CHUNK_BYTES = 64 * 1024 * 1024
"""Largest chunk, which is the unit of work of a conversion."""


@dataclass(frozen=True)
class SliceCopy:
    """Copy of the slice `source` of a Hugging Face tensor to the region of the same shape at `at` of a chunk."""

    source: TensorSlice
    at: Shape

    @property
    def index(self) -> tuple[slice, ...]:
        """The index of the region in the chunk."""
        return tuple(slice(o, o + n) for o, n in zip(self.at, self.source.shape, strict=True))


@dataclass(frozen=True)
class Chunk:
    """A tensor in one file, filled with slices of Hugging Face tensors; elements that no slice fills are zero.

    `position` is its first byte in the file. `scales` is the first byte of the block scales of an FP8 chunk
    (quantization/block_fp8.py), or None.
    """

    position: int
    shape: Shape
    dtype: torch.dtype
    pieces: tuple[SliceCopy, ...]
    scales: int | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """One output file. `fixed` are (position, bytes) that do not depend on tensor values."""

    name: str
    num_bytes: int
    chunks: tuple[Chunk, ...]
    fixed: tuple[tuple[int, bytes], ...] = ()


class TensorSource(Protocol):
    """Source of tensor slices; several threads call it."""

    def read_into(self, hf: TensorSlice, out: Tensor) -> None:
        """Fill `out` with the slice, in the dtype of `out`."""
        ...


class ChunkCodec(Protocol):
    """Conversion between the values of a chunk and its FP8 bytes."""

    def encode(self, chunk: Chunk, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantized values and scales."""
        ...

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the values that a reader of the file gets."""
        ...

    def scales_shape(self, shape: Shape) -> Shape:
        """Return the shape of the scales of a chunk of `shape`."""
        ...


def pieces_within(pieces: Sequence[SliceCopy], begin: Shape, shape: Shape) -> Iterator[SliceCopy]:
    """Yield the parts of `pieces` inside the region at `begin`, with offsets that count from `begin`."""
    for piece in pieces:
        low = tuple(max(a, b) for a, b in zip(piece.at, begin, strict=True))
        high = tuple(min(a + n, b + m) for a, n, b, m in zip(piece.at, piece.source.shape, begin, shape, strict=True))
        size = tuple(h - lo for lo, h in zip(low, high, strict=True))
        if all(n > 0 for n in size):
            shift = tuple(lo - a for lo, a in zip(low, piece.at, strict=True))
            source_offsets = tuple(o + s for o, s in zip(piece.source.offsets, shift, strict=True))
            chunk_offsets = tuple(lo - b for lo, b in zip(low, begin, strict=True))
            yield SliceCopy(TensorSlice(piece.source.name, source_offsets, size), chunk_offsets)


def rows_at_once(shape: Shape, dtype: torch.dtype, multiple: int = 1) -> int:
    """Return the rows (first dimension) of a chunk of at most CHUNK_BYTES: a multiple of `multiple`, not less."""
    row = math.prod(shape[1:]) * dtype.itemsize
    return min(shape[0], max(multiple, CHUNK_BYTES // max(1, row) // multiple * multiple))

"""Output files planned before anything is read: their chunks, and the slices each chunk is made of."""

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


@dataclass(frozen=True)
class CopyPiece:
    """The slice `source` of a Hugging Face tensor is the box of the same shape at `at` of a chunk."""

    source: TensorSlice
    at: Shape

    @property
    def index(self) -> tuple[slice, ...]:
        """Of the chunk."""
        return tuple(slice(o, o + n) for o, n in zip(self.at, self.source.shape, strict=True))


@dataclass(frozen=True)
class Chunk:
    """Bytes of one file that are a tensor, made of slices of Hugging Face tensors; what they leave free is zero.

    `scales`, where not None, is the position of the block scales of an FP8 chunk (quantization/block_fp8.py).
    """

    position: int
    shape: Shape
    dtype: torch.dtype
    pieces: tuple[CopyPiece, ...]
    scales: int | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """`fixed` are bytes that are known beforehand: (position, bytes)."""

    name: str
    num_bytes: int
    chunks: tuple[Chunk, ...]
    fixed: tuple[tuple[int, bytes], ...] = ()


class TensorSource(Protocol):
    """Where chunks are filled from; called by several threads."""

    def read_into(self, box: TensorSlice, out: Tensor) -> None:
        """Fill `out` with the slice, in the dtype of `out`."""
        ...


class ChunkCodec(Protocol):
    """What the bytes of a chunk with scales are of its values."""

    def encode(self, chunk: Chunk, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales."""
        ...

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The values that a reader gets."""
        ...

    def scales_shape(self, shape: Shape) -> Shape:
        """Of the scales of a chunk of `shape`."""
        ...


def pieces_within(pieces: Sequence[CopyPiece], begin: Shape, shape: Shape) -> Iterator[CopyPiece]:
    """The parts of `pieces` inside the box at `begin`, in coordinates that start there."""
    for piece in pieces:
        low = tuple(max(a, b) for a, b in zip(piece.at, begin, strict=True))
        high = tuple(min(a + n, b + m) for a, n, b, m in zip(piece.at, piece.source.shape, begin, shape, strict=True))
        size = tuple(h - lo for lo, h in zip(low, high, strict=True))
        if all(n > 0 for n in size):
            shift = tuple(lo - a for lo, a in zip(low, piece.at, strict=True))
            there = tuple(o + s for o, s in zip(piece.source.offsets, shift, strict=True))
            here = tuple(lo - b for lo, b in zip(low, begin, strict=True))
            yield CopyPiece(TensorSlice(piece.source.name, there, size), here)


def rows_at_once(shape: Shape, dtype: torch.dtype, multiple: int = 1) -> int:
    """Rows (first dimension) of a chunk of at most CHUNK_BYTES, at least `multiple`."""
    row = math.prod(shape[1:]) * dtype.itemsize
    return min(shape[0], max(multiple, CHUNK_BYTES // max(1, row) // multiple * multiple))

"""Buffers in host memory for copies of tensors, pinned for CUDA devices.

Asserted by tests/unit/formats/test_host_buffers.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MAX_PIECE_BYTES = 1 << 30
_MIN_PIECE_BYTES = 1 << 20


class HostBuffers:
    """Host memory for parts of `sizes` bytes, in buffers that waste little of what the pinned allocator rounds up."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        """Allocate the memory, pinned if `device`, to and from which it is copied, is a CUDA device."""
        pinned = device.type == "cuda"
        self._pieces = [
            torch.empty(n, dtype=torch.uint8, device="cpu", pin_memory=pinned) for n in piece_sizes(sum(sizes))
        ]
        self.sizes = list(sizes)
        self._starts = [0, *itertools.accumulate(sizes)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(piece.nbytes for piece in self._pieces)

    def write(self, part: int, values: Tensor) -> None:
        """Store `values` ([bytes] uint8) as part number `part`; the copy may still be running on the device."""
        for piece, inside in self._overlaps(part, values):
            piece.copy_(inside, non_blocking=True)

    def read(self, part: int, values: Tensor) -> None:
        """Copy part number `part` to `values` ([bytes] uint8); the copy may still be running on the device."""
        for piece, inside in self._overlaps(part, values):
            inside.copy_(piece, non_blocking=True)

    def pieces(self, part: int) -> Iterator[Tensor]:
        """Yield the memory of part number `part` in order, [bytes] uint8 each."""
        for piece, low, high in self._ranges(part):
            yield piece[low:high]

    def _overlaps(self, part: int, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (memory of a piece, values that belong there)."""
        done = 0
        for piece, low, high in self._ranges(part):
            yield piece[low:high], values[done : done + high - low]
            done += high - low

    def _ranges(self, part: int) -> Iterator[tuple[Tensor, int, int]]:
        """Yield (piece, first byte, last byte + 1) of a part."""
        first, last, start = self._starts[part], self._starts[part + 1], 0
        for piece in self._pieces:
            low, high = max(first, start), min(last, start + piece.nbytes)
            if low < high:
                yield piece, low - start, high - start
            start += piece.nbytes


def piece_sizes(num_bytes: int) -> list[int]:
    """Return the sizes of host buffers for `num_bytes`: powers of two of at most 1 GiB, then a rest below 1 MiB.

    PyTorch's allocator of pinned memory rounds each request up to a power of two
    (aten/src/ATen/core/CachingHostAllocator.h), so one buffer of 8.2 GiB would occupy 16.
    """
    sizes = [MAX_PIECE_BYTES] * (num_bytes // MAX_PIECE_BYTES)
    rest, size = num_bytes % MAX_PIECE_BYTES, MAX_PIECE_BYTES // 2
    while size >= _MIN_PIECE_BYTES:
        if rest >= size:
            sizes.append(size)
            rest -= size
        size //= 2
    return sizes + [rest] * bool(rest)

"""Reading and writing boxes of row-major tensors in files by byte ranges: only the bytes of the box are touched."""

from __future__ import annotations

import errno
import itertools
import math
import os

import torch
from torch import Tensor

Shape = tuple[int, ...]
BLOCK_BYTES = 4096  # what every file system takes as a block of direct writing
_WRITE_BYTES = 16 * 1024 * 1024  # a multiple of the block


class ShortFileError(OSError):
    """A file ended before the bytes that it should hold."""


def read_box(fd: int, position: int, whole: Shape, offsets: Shape, out: Tensor) -> int:
    """Fill `out` with the box at `offsets` of the row-major tensor of shape `whole` that starts at byte `position`.

    Returns:
        The number of bytes read: those of the box, no others.
    Raises:
        ShortFileError: the file ends before.
    """
    if out.numel() == 0:
        return 0
    if not out.is_contiguous():
        compact = torch.empty(out.shape, dtype=out.dtype)
        count = read_box(fd, position, whole, offsets, compact)
        out.copy_(compact)
        return count
    target = as_bytes(out)
    strides = [math.prod(whole[d + 1 :]) * out.itemsize for d in range(len(whole))]
    # the trailing dimensions that the box covers whole, and the one before them, are one run of bytes
    split = len(whole)
    while split > 0 and (split == len(whole) or out.shape[split] == whole[split]):
        split -= 1
    run = math.prod(out.shape[split:]) * out.itemsize
    start = position + sum(o * s for o, s in zip(offsets, strides, strict=True))
    done = 0
    for index in itertools.product(*(range(n) for n in out.shape[:split])):
        where = start + sum(i * s for i, s in zip(index, strides[:split], strict=True))
        _read_all(fd, target[done : done + run], where)
        done += run
    return done


def write_all(fd: int, data: memoryview | bytes, position: int) -> None:
    """Write every byte of `data` at `position`."""
    view = memoryview(data)
    while len(view):
        count = os.pwrite(fd, view[:_WRITE_BYTES], position)
        view, position = view[count:], position + count


def write_blocks(fd: int, data: memoryview, address: int, position: int) -> tuple[int, int]:
    """Write the whole blocks among `data`, which lies at `address`, by a descriptor for direct writing.

    Returns:
        What is written: `data[begin:end]`; nothing where address and position differ in their distance to a block, or
        where the file system asks for other blocks than these.
    """
    begin = min(-position % BLOCK_BYTES, len(data))
    end = begin + (len(data) - begin) // BLOCK_BYTES * BLOCK_BYTES
    if (address - position) % BLOCK_BYTES or begin == end:
        return 0, 0
    try:
        write_all(fd, data[begin:end], position + begin)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0, 0
    return begin, end


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    assert flat.numel() == 0 or flat.data_ptr() == tensor.data_ptr(), "a copy would be filled instead"
    return flat.numpy().data


def _read_all(fd: int, target: memoryview, position: int) -> None:
    while len(target):
        count = os.preadv(fd, [target], position)
        if count == 0:
            raise ShortFileError(f"ends at byte {position}, {len(target)} bytes before the end of a tensor")
        target, position = target[count:], position + count

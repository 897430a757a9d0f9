"""Byte-range input and output of slices of row-major tensors in files; only the bytes of the slice are read."""

from __future__ import annotations

import ctypes
import errno
import itertools
import math
import os

import torch
from torch import Tensor

Shape = tuple[int, ...]
BLOCK_BYTES = 4096  # every file system accepts this block size for direct writes
_WRITE_BYTES = 16 * 1024 * 1024  # a multiple of the block


class ShortFileError(OSError):
    """A file ends before the bytes that it should hold."""


def read_slice(fd: int, position: int, whole: Shape, offsets: Shape, out: Tensor) -> int:
    """Fill `out` with the slice at `offsets` of the row-major tensor of shape `whole` that starts at byte `position`.

    Returns:
        The number of bytes read, which are those of the slice.

    Raises:
        ShortFileError: the file ends before the end of the slice.
    """
    if out.numel() == 0:
        return 0
    if not out.is_contiguous():
        compact = torch.empty(out.shape, dtype=out.dtype)
        count = read_slice(fd, position, whole, offsets, compact)
        out.copy_(compact)
        return count
    target = tensor_memory(out)
    strides = [math.prod(whole[d + 1 :]) * out.itemsize for d in range(len(whole))]
    # The trailing dimensions that the slice covers whole, and the one before them, are contiguous bytes.
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
    """Write the whole blocks of `data`, which is at memory address `address`, through a descriptor for direct writes.

    Returns:
        (begin, end) of the written part `data[begin:end]`. It is empty if `address` and `position` are not aligned to a
        block in the same way, or if the file system needs another block size.
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


def tensor_memory(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes; the view keeps the tensor alive.

    Not by `numpy()`: torch cannot resize the storage afterwards, so a policy could not be offloaded any more.
    """
    assert tensor.is_cpu, f"the tensor is on {tensor.device}"
    assert tensor.is_contiguous(), "the tensor must be contiguous"
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


def _read_all(fd: int, target: memoryview, position: int) -> None:
    while len(target):
        count = os.preadv(fd, [target], position)
        if count == 0:
            raise ShortFileError(f"ends at byte {position}, {len(target)} bytes before the end of a tensor")
        target, position = target[count:], position + count

"""Reads the memory of another process on this machine with one copy: Linux's process_vm_readv.

A tensor is described as evenly spaced runs of bytes (`StridedRange`), so that another process can read it into a tensor
of its own. The kernel allows this between processes of one user. With Yama's ptrace_scope=1 only a debugger may read;
there a process can permit other readers (PR_SET_PTRACER), and this module permits every process of the same user, as a
kernel without Yama does. A container may forbid the call, so `PeerMemory` tests at construction which ranks can be
read.

Asserted by tests/unit/weight_sync/transports/test_process_vm_readv.py.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_mega.parallel.peer_group import PeerGroup

log = logging.getLogger("grpo_mega.weight_sync")

MIN_RUN_BYTES = 1024  # the kernel looks up a page for each run, so shorter runs are copied faster through a buffer
_MAX_RUNS, _MAX_BYTES = 1024, 1 << 30  # of one call: IOV_MAX, and less than the kernel's limit of 2 GiB
_PR_SET_PTRACER, _ANY_PROCESS = 0x59616D61, ctypes.c_ulong(-1)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]


@dataclass(frozen=True)
class StridedRange:
    """Evenly spaced memory: `count` runs of `num_bytes`, the first at `address`, each `stride` bytes after the last."""

    address: int
    count: int
    num_bytes: int
    stride: int

    @classmethod
    def of(cls, values: Tensor) -> StridedRange | None:
        """Return the runs of a host tensor of any shape, or None if they are too short or not evenly spaced."""
        if values.device.type != "cpu" or not values.numel():
            return None
        run, size = values.itemsize, values.dim()
        while size and (values.shape[size - 1] == 1 or values.stride(size - 1) * values.itemsize == run):
            size -= 1
            run *= values.shape[size]
        rest = [(n, stride * values.itemsize) for n, stride in zip(values.shape, values.stride(), strict=True)][:size]
        rest = [(n, stride) for n, stride in rest if n > 1]
        count, stride = 1, run
        for n, each in reversed(rest):
            if count > 1 and each != count * stride:
                return None
            count, stride = count * n, stride if count > 1 else each
        return cls(values.data_ptr(), count, run, stride) if count == 1 or run >= MIN_RUN_BYTES else None

    @classmethod
    def whole(cls, values: Tensor) -> StridedRange:
        """Return the single run of a contiguous tensor of any shape."""
        return cls(values.data_ptr(), 1, values.nbytes, values.nbytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of all runs."""
        return self.count * self.num_bytes

    def split(self, num_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (address, length) of all bytes, in runs of `num_bytes`, which must divide the run length."""
        for start in range(self.address, self.address + self.count * self.stride, self.stride):
            for at in range(start, start + self.num_bytes, num_bytes):
                yield at, num_bytes


def allow_reading() -> None:
    """Permit other processes of this user to read this process, also under Yama's ptrace_scope=1."""
    _libc.prctl(_PR_SET_PTRACER, _ANY_PROCESS, 0, 0, 0)  # without Yama it returns EINVAL, and no permission is needed


def read_ranges(process: int, pairs: Sequence[tuple[StridedRange, StridedRange]]) -> None:
    """Copy memory of another process into memory of this one, with as few system calls as possible.

    Args:
        process: the other process's id.
        pairs: (source in the other process, target in this process); `compatible` and of equal bytes.

    Raises:
        OSError: the process has exited, may not be read, or an address is invalid. Names both processes.
    """
    sources: list[tuple[int, int]] = []  # `struct iovec`: address, length
    targets: list[tuple[int, int]] = []
    for theirs, ours in pairs:
        assert theirs.total_bytes == ours.total_bytes, f"{theirs.total_bytes} bytes into {ours.total_bytes}"
        assert compatible(theirs, ours), f"runs of {theirs.num_bytes} bytes into runs of {ours.num_bytes}"
        unit = min(theirs.num_bytes, ours.num_bytes)
        sources += theirs.split(unit)
        targets += ours.split(unit)
    start, num_bytes = 0, 0
    for i, (_, size) in enumerate(sources):
        if i - start == _MAX_RUNS or (i > start and num_bytes + size > _MAX_BYTES):
            _read(process, sources[start:i], targets[start:i])
            start, num_bytes = i, 0
        num_bytes += size
    if sources:
        _read(process, sources[start:], targets[start:])


def _read(process: int, sources: list[tuple[int, int]], targets: list[tuple[int, int]]) -> None:
    source, target = np.asarray(sources, np.uint64), np.asarray(targets, np.uint64)
    expected = int(source[:, 1].sum())
    done = _libc.process_vm_readv(process, target.ctypes.data, len(target), source.ctypes.data, len(source), 0)
    if done != expected:
        reason = os.strerror(ctypes.get_errno()) if done < 0 else f"{done} of {expected} bytes were read"
        raise OSError(f"process {os.getpid()} could not read process {process}: {reason}")


def compatible(theirs: StridedRange, ours: StridedRange) -> bool:
    """Return True if the run length of one range divides that of the other, as `read_ranges` needs."""
    longer, shorter = max(theirs.num_bytes, ours.num_bytes), min(theirs.num_bytes, ours.num_bytes)
    return longer % shorter == 0


RANGE_BYTES = 32  # of one range in a table: four words of 64 bits


def write_range_table(table: Tensor, ranges: list[StridedRange]) -> None:
    """Write ranges to the first bytes of `table` ([bytes] uint8), RANGE_BYTES each."""
    words = torch.tensor([astuple(each) for each in ranges], dtype=torch.int64)
    table[: words.nbytes].view(torch.int64).copy_(words.flatten())


def read_range_table(table: Tensor, count: int) -> list[StridedRange]:
    """Return the first `count` ranges that `write_range_table` has written to `table` ([bytes] uint8)."""
    words = table[: count * RANGE_BYTES].view(torch.int64).view(count, -1)
    return [StridedRange(*row) for row in words.tolist()]


class PeerMemory:
    """Access to the memory of other ranks on this machine.

    Access is not symmetric: a container may forbid a rank to read a peer that can read this rank.
    """

    def __init__(self, world: PeerGroup, processes: Mapping[int, int]) -> None:
        """Collective: every rank tries to read a random word from every other rank of its machine.

        Args:
            world: all ranks.
            processes: rank -> process id, of the other ranks on this machine.
        """
        allow_reading()
        self._processes = processes
        self._word = torch.tensor([secrets.randbits(62)])
        words = world.gather((StridedRange.whole(self._word), int(self._word)))
        self._readable = {rank for rank in processes if self._can_read(rank, *words[rank])}
        if len(self._readable) < len(processes):
            unreadable = sorted(processes.keys() - self._readable)
            log.info(
                "rank %d cannot read the memory of ranks %s on this machine: they send it packed buffers",
                world.rank,
                unreadable,
            )
        self._readers = {rank for rank, readable in enumerate(world.gather(self._readable)) if world.rank in readable}

    def is_read_by(self, rank: int) -> bool:
        """Return True if `rank` can read this rank's memory, so a message to it may contain addresses."""
        return rank in self._readers

    def read(self, rank: int, pairs: Sequence[tuple[StridedRange, StridedRange]]) -> None:
        """Copy memory of `rank` into memory of this process; the pairs are those of `read_ranges`.

        Raises:
            OSError: the process has exited, may not be read, or an address is invalid. Names both processes.
        """
        read_ranges(self._processes[rank], pairs)

    def _can_read(self, rank: int, address: StridedRange, word: int) -> bool:
        found = torch.zeros(1, dtype=torch.int64)
        try:
            self.read(rank, [(address, StridedRange.whole(found))])
        except OSError:
            return False
        return int(found) == word  # otherwise the process id belongs to another process, in another namespace

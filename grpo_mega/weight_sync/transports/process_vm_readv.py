"""Reading what another process of this machine holds, with no buffer between: Linux's process_vm_readv.

A tensor is told as runs of bytes, so that another process can read it into a tensor of its own with one copy. The
kernel allows it between processes of one user; where Yama restricts that to debuggers (ptrace_scope=1), a process may
name who may read it, and names everybody of its user, as a kernel without Yama does. A container may forbid it all:
whether it works is tried.
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

LEAST_RUN = 1024  # bytes; the kernel looks a page up for each run: shorter ones are copied faster through a buffer
_MOST_RUNS, _MOST_BYTES = 1024, 1 << 30  # of one call: IOV_MAX, and less than the 2 GiB that it ends at
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)

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
    """`count` runs of `num_bytes`, each `stride` bytes behind the one before, the first at `address`."""

    address: int
    count: int
    num_bytes: int
    stride: int

    @classmethod
    def of(cls, values: Tensor) -> StridedRange | None:
        """Those of a tensor of the host; None where they are too short, or not evenly spaced."""
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
        return cls(values.data_ptr(), count, run, stride) if count == 1 or run >= LEAST_RUN else None

    @classmethod
    def whole(cls, values: Tensor) -> StridedRange:
        """The one of a tensor without gaps."""
        return cls(values.data_ptr(), 1, values.nbytes, values.nbytes)

    @property
    def total_bytes(self) -> int:
        return self.count * self.num_bytes

    def cut(self, num_bytes: int) -> Iterator[tuple[int, int]]:
        """(address, length) of all, in runs of `num_bytes`."""
        for start in range(self.address, self.address + self.count * self.stride, self.stride):
            for at in range(start, start + self.num_bytes, num_bytes):
                yield at, num_bytes


def allow_reading() -> None:
    """Other processes of this user may read this one, also where Yama asks for it."""
    _libc.prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)  # without Yama: EINVAL, and nothing to allow


def read_ranges(process: int, pairs: Sequence[tuple[StridedRange, StridedRange]]) -> None:
    """Copies what the first of each pair are in the memory of a process into the second, in few calls.

    Raises:
        OSError: it is gone, or may not be read; names both.
    """
    sources: list[tuple[int, int]] = []  # `struct iovec`: address, length
    targets: list[tuple[int, int]] = []
    for theirs, ours in pairs:
        assert theirs.total_bytes == ours.total_bytes, f"{theirs.total_bytes} bytes for {ours.total_bytes}"
        assert fits(theirs, ours), f"runs of {theirs.num_bytes} bytes into runs of {ours.num_bytes}"
        unit = min(theirs.num_bytes, ours.num_bytes)
        sources += theirs.cut(unit)
        targets += ours.cut(unit)
    start, num_bytes = 0, 0
    for i, (_, size) in enumerate(sources):
        if i - start == _MOST_RUNS or (i > start and num_bytes + size > _MOST_BYTES):
            _read(process, sources[start:i], targets[start:i])
            start, num_bytes = i, 0
        num_bytes += size
    if sources:
        _read(process, sources[start:], targets[start:])


def _read(process: int, sources: list[tuple[int, int]], targets: list[tuple[int, int]]) -> None:
    source, target = np.asarray(sources, np.uint64), np.asarray(targets, np.uint64)
    wanted = int(source[:, 1].sum())
    done = _libc.process_vm_readv(process, target.ctypes.data, len(target), source.ctypes.data, len(source), 0)
    if done != wanted:
        why = os.strerror(ctypes.get_errno()) if done < 0 else f"{done} of {wanted} bytes"
        raise OSError(f"process {os.getpid()} could not read process {process}: {why}")


def fits(theirs: StridedRange, ours: StridedRange) -> bool:
    """Do the runs of one side divide those of the other?"""
    longer, shorter = max(theirs.num_bytes, ours.num_bytes), min(theirs.num_bytes, ours.num_bytes)
    return longer % shorter == 0


PLACE_BYTES = 32  # four words of 64 bits


def put_places(table: Tensor, places: list[StridedRange]) -> None:
    """Into bytes that another process reads."""
    words = torch.tensor([astuple(place) for place in places], dtype=torch.int64)
    table[: words.nbytes].view(torch.int64).copy_(words.flatten())


def take_places(table: Tensor, count: int) -> list[StridedRange]:
    """What `put_places` has put there."""
    words = table[: count * PLACE_BYTES].view(torch.int64).view(count, -1)
    return [StridedRange(*row) for row in words.tolist()]


class PeerMemory:
    """The ranks of this machine whose memory this one can read, and those that can read its own."""

    def __init__(self, world: PeerGroup, processes: Mapping[int, int]) -> None:
        """Collective: each rank tries.

        Args:
            world: all ranks.
            processes: rank -> process, of the other ranks of this machine.
        """
        allow_reading()
        self._processes = processes
        self._word = torch.tensor([secrets.randbits(62)])  # what others must find here
        told = world.gather((StridedRange.whole(self._word), int(self._word)))
        self._readable = {rank for rank in processes if self._reads(rank, *told[rank])}
        if len(self._readable) < len(processes):
            closed = sorted(processes.keys() - self._readable)
            log.info("this machine lets rank %d not read ranks %s: they pack what they send it", world.rank, closed)
        self._readers = {rank for rank, readable in enumerate(world.gather(self._readable)) if world.rank in readable}

    def is_read_by(self, rank: int) -> bool:
        """May it be told where bytes are, instead of the bytes?"""
        return rank in self._readers

    def read(self, rank: int, pairs: Sequence[tuple[StridedRange, StridedRange]]) -> None:
        """`read_ranges` from that rank's process; raises as that does."""
        read_ranges(self._processes[rank], pairs)

    def _reads(self, rank: int, place: StridedRange, word: int) -> bool:
        found = torch.zeros(1, dtype=torch.int64)
        try:
            self.read(rank, [(place, StridedRange.whole(found))])
        except OSError:
            return False
        return int(found) == word  # else it is another process of that number

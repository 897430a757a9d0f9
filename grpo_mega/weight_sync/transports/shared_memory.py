"""Buckets between processes of one machine: the sender packs into memory that its receivers have mapped.

Each rank owns one segment with its two buffers and a row of counters; with `DeviceSlots` (cuda_ipc.py) the buffers are
on its GPU, and only the counters here. A sender publishes the number of turns that it has filled; a receiver, in its
own segment, how many it has taken over. So a byte is copied twice, into a buffer and out of it, and a receiver has no
buffer; or once, where the machine lets ranks read each other's memory (remote_memory.py), which is tried. A segment's
file is gone from /dev/shm as soon as all have mapped it: nothing outlives a job that is killed.
Asserted by tests/parallel/test_sync_ranks.py.
"""

from __future__ import annotations

import mmap
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from grpo_mega.parallel.peer_group import PeerGroup
from grpo_mega.types import UserError
from grpo_mega.weight_sync.transports.base import BucketMessage, Round, TransportError, failed_wait
from grpo_mega.weight_sync.transports.cuda_ipc import DeviceSlots
from grpo_mega.weight_sync.transports.process_vm_readv import PeerMemory

_FOLDER = Path("/dev/shm")
_COUNTERS = 4096  # bytes: turns filled, turns taken over, process id
_FILLED, _TAKEN, _PROCESS = 0, 1, 2
_POLL_SECONDS = 50e-6
_LOOK_SECONDS = 0.2  # between two looks whether a peer's process is alive


def machine_id() -> str:
    """The same for processes that can map each other's segments: of one machine, one /dev/shm and one user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{_FOLDER.stat().st_dev}/{os.getuid()}"


class SharedMemoryTransport:
    """Collective: all ranks of `world` construct it; `turns` hold only messages between ranks of this machine."""

    def __init__(
        self,
        turns: Sequence[Round],
        slot_bytes: int,
        world: PeerGroup,
        timeout: float,
        device_slots: DeviceSlots | None = None,
    ) -> None:
        """`slot_bytes`: of each of two buffers, of which the first `send_bytes` of a turn are this transport's."""
        self._timeout, self._rank = timeout, world.rank
        self._readers = {turn.number: [m.peer for m in turn.sends] for turn in turns}
        self._past = 0  # turns of earlier syncs: counters only grow
        self._num_turns = max((turn.number for turn in turns), default=-1) + 1
        path = _FOLDER / f"grpo_mega_{uuid.uuid4().hex}"
        segment = _create(path, _COUNTERS + (2 * slot_bytes if device_slots is None else 0))
        self._counters = {self._rank: segment[:_COUNTERS].view(torch.int64)}
        self._counters[self._rank][_PROCESS] = os.getpid()
        self._slots = {self._rank: segment[_COUNTERS:] if device_slots is None else device_slots.own}
        self._settle = _settled if device_slots is None else device_slots.settle
        told = None if device_slots is None else device_slots.told
        for rank, machine, other, theirs in world.gather((self._rank, machine_id(), str(path), told)):
            if rank != self._rank and machine == machine_id():
                segment = _open(Path(other))
                self._counters[rank] = segment[:_COUNTERS].view(torch.int64)
                self._slots[rank] = segment[_COUNTERS:] if device_slots is None else device_slots.map(theirs, rank)
        world.gather(None)  # all have mapped it
        path.unlink()
        processes = {rank: int(each[_PROCESS]) for rank, each in self._counters.items() if rank != self._rank}
        self.peer_memory = PeerMemory(world, processes) if device_slots is None else None

    @property
    def buffers(self) -> Sequence[Tensor]:
        """This rank's two, whole: what is beyond the sends of a turn is free for other transports."""
        return [self._slot(self._rank, number) for number in (0, 1)]

    def outgoing(self, turn: Round) -> Tensor:
        earlier = turn.number - 2
        for peer in self._readers.get(earlier, ()) if earlier >= 0 else ():
            self._await(Round(earlier, (), ()), BucketMessage(peer, 0, 0), _TAKEN, sends=True)
        return self._slot(self._rank, turn.number)[: turn.send_bytes]

    def send_or_receive_in_place(
        self, turn: Round, message: BucketMessage, start: int, memory: Tensor, *, sends: bool
    ) -> bool:
        return False

    def start(self, turn: Round) -> None:
        self._settle()
        self._counters[self._rank][_FILLED] = self._past + turn.number + 1

    def incoming(self, turn: Round, message: BucketMessage) -> Tensor:
        self._await(turn, message, _FILLED, sends=False)
        return self._slot(message.peer, turn.number)[message.start : message.start + message.num_bytes]

    def finish(self, turn: Round) -> None:
        self._settle()
        self._counters[self._rank][_TAKEN] = self._past + turn.number + 1
        if turn.number == self._num_turns - 1:  # the next sync starts with free buffers
            for earlier in range(max(0, turn.number - 1), self._num_turns):
                for peer in self._readers.get(earlier, ()):
                    self._await(Round(earlier, (), ()), BucketMessage(peer, 0, 0), _TAKEN, sends=True)
            self._past += self._num_turns

    def _slot(self, rank: int, turn: int) -> Tensor:
        both = self._slots[rank]
        size = both.numel() // 2
        start = turn % 2 * size
        return both[start : start + size]

    def _await(self, turn: Round, message: BucketMessage, counter: int, *, sends: bool) -> None:
        counters, wanted = self._counters[message.peer], self._past + turn.number + 1
        end = time.monotonic() + self._timeout
        look = time.monotonic() + _LOOK_SECONDS
        while int(counters[counter]) < wanted:
            now = time.monotonic()
            if now > end:
                why = failed_wait(turn, message, self._rank, sends, self._timeout, "no answer")
                raise TransportError(why, message.peer)
            if now > look:
                if not _lives(int(counters[_PROCESS])):
                    why = failed_wait(turn, message, self._rank, sends, self._timeout, "it has ended")
                    raise TransportError(why, message.peer)
                look = now + _LOOK_SECONDS
            time.sleep(_POLL_SECONDS)


def _settled() -> None:
    """What a CPU has copied is there."""


def _create(path: Path, num_bytes: int) -> Tensor:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)  # a full /dev/shm fails here, not as a bus error later
    except OSError as error:
        os.close(descriptor)
        path.unlink()
        raise UserError(
            f"weight_sync.transport=shared_memory: {_FOLDER} has no room for {num_bytes} bytes ({error.strerror})",
            remedy="use a smaller weight_sync.bucket_bytes, or weight_sync.transport=gloo",
        ) from error
    return _map(descriptor)


def _open(path: Path) -> Tensor:
    return _map(os.open(path, os.O_RDWR))


def _map(descriptor: int) -> Tensor:
    """Uint8; the mapping lives as long as the tensor."""
    memory = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"

"""Transport between processes of one machine: the sender packs into memory that its receivers have mapped.

Each rank owns one segment in /dev/shm with its two buffers and a row of counters. With `DeviceSlots` (cuda_ipc.py) the
buffers are on the rank's GPU, and only the counters are in the segment. A sender publishes the number of rounds that it
has filled. A receiver publishes, in its own segment, the number of rounds that it has read.

A byte is copied twice, into a buffer and out of it, and a receiver needs no buffer. Where ranks can read each other's
memory (process_vm_readv.py), a byte is copied once.

A segment's file is deleted as soon as all ranks have mapped it, so a killed job leaves nothing behind.
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
from grpo_mega.parallel.shared_memory import SHARED_MEMORY
from grpo_mega.types import UserError
from grpo_mega.weight_sync.transports.base import BucketMessage, Round, TransportError, failed_wait
from grpo_mega.weight_sync.transports.cuda_ipc import DeviceSlots
from grpo_mega.weight_sync.transports.process_vm_readv import PeerMemory

_COUNTERS = 4096  # bytes of the counters at the start of a segment
_FILLED, _READ, _PROCESS = 0, 1, 2  # counters: rounds filled, rounds read, process id
_POLL_SECONDS = 50e-6
_LIVENESS_SECONDS = 0.2  # between two checks that a peer's process is alive


def machine_id() -> str:
    """Return a name that is equal for processes that can map each other's segments.

    Such processes run on one machine, with one /dev/shm and one user.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{SHARED_MEMORY.stat().st_dev}/{os.getuid()}"


class SharedMemoryTransport:
    """`Transport` between the ranks of one machine. Collective: all ranks of `world` construct it."""

    def __init__(
        self,
        rounds: Sequence[Round],
        slot_bytes: int,
        world: PeerGroup,
        timeout_seconds: float,
        device_slots: DeviceSlots | None = None,
    ) -> None:
        """Map the segments of all ranks of this machine.

        Args:
            rounds: the rounds of this rank; all messages are between ranks of this machine.
            slot_bytes: of each of the two buffers. This transport uses the first `send_bytes` of a round.
            world: all ranks.
            timeout_seconds: limit of every wait.
            device_slots: buffers on the rank's GPU; None: the buffers are in the segment.

        Raises:
            UserError: /dev/shm has too little free space.
        """
        self._timeout, self._rank = timeout_seconds, world.rank
        self._receivers = {each.number: [m.peer for m in each.sends] for each in rounds}
        self._past_rounds = 0  # of earlier syncs; counters only grow
        self._num_rounds = max((each.number for each in rounds), default=-1) + 1
        path = SHARED_MEMORY / f"grpo_mega_{uuid.uuid4().hex}"
        segment = _create_segment(path, _COUNTERS + (2 * slot_bytes if device_slots is None else 0))
        self._counters = {self._rank: segment[:_COUNTERS].view(torch.int64)}
        self._counters[self._rank][_PROCESS] = os.getpid()
        self._slots = {self._rank: segment[_COUNTERS:] if device_slots is None else device_slots.own}
        self._synchronize = _no_synchronization if device_slots is None else device_slots.synchronize
        handle = None if device_slots is None else device_slots.handle
        for rank, machine, other, theirs in world.gather((self._rank, machine_id(), str(path), handle)):
            if rank != self._rank and machine == machine_id():
                segment = _open_segment(Path(other))
                self._counters[rank] = segment[:_COUNTERS].view(torch.int64)
                self._slots[rank] = segment[_COUNTERS:] if device_slots is None else device_slots.map(theirs, rank)
        world.gather(None)  # barrier: all ranks have mapped the segment
        path.unlink()
        processes = {rank: int(each[_PROCESS]) for rank, each in self._counters.items() if rank != self._rank}
        self.peer_memory = PeerMemory(world, processes) if device_slots is None else None

    @property
    def buffers(self) -> Sequence[Tensor]:
        """The two buffers of this rank, whole, each [slot_bytes] uint8.

        Bytes after the sends of a round are free for other transports.
        """
        return [self._slot(self._rank, number) for number in (0, 1)]

    def outgoing(self, round_: Round) -> Tensor:
        """See `Transport`. Waits until all receivers have read the round before the previous one."""
        earlier = round_.number - 2
        if earlier >= 0:
            self._await_receivers(earlier)
        return self._slot(self._rank, round_.number)[: round_.send_bytes]

    def send_in_place(self, round_: Round, message: BucketMessage, start: int, memory: Tensor) -> bool:
        """See `Transport`. Returns False: not supported. `peer_memory` serves the same purpose."""
        return False

    def receive_in_place(self, round_: Round, message: BucketMessage, start: int, memory: Tensor) -> bool:
        """See `Transport`. Returns False: not supported. `peer_memory` serves the same purpose."""
        return False

    def start(self, round_: Round) -> None:
        """See `Transport`. Publishes that the round is filled."""
        self._synchronize()
        self._counters[self._rank][_FILLED] = self._past_rounds + round_.number + 1

    def incoming(self, round_: Round, message: BucketMessage) -> Tensor:
        """See `Transport`. Returns the sender's buffer."""
        self._wait(round_, message, _FILLED, sends=False)
        return self._slot(message.peer, round_.number)[message.start : message.start + message.num_bytes]

    def finish(self, round_: Round) -> None:
        """See `Transport`. Publishes that the round is read; after the last round, waits for all receivers."""
        self._synchronize()
        self._counters[self._rank][_READ] = self._past_rounds + round_.number + 1
        if round_.number == self._num_rounds - 1:  # the next sync starts with free buffers
            for earlier in range(max(0, round_.number - 1), self._num_rounds):
                self._await_receivers(earlier)
            self._past_rounds += self._num_rounds

    def _slot(self, rank: int, round_number: int) -> Tensor:
        both = self._slots[rank]
        size = both.numel() // 2
        start = round_number % 2 * size
        return both[start : start + size]

    def _await_receivers(self, number: int) -> None:
        """Wait until all receivers of round `number` have read it."""
        for peer in self._receivers.get(number, ()):
            self._wait(Round(number, (), ()), BucketMessage(peer, 0, 0), _READ, sends=True)

    def _wait(self, round_: Round, message: BucketMessage, counter: int, *, sends: bool) -> None:
        counters, target = self._counters[message.peer], self._past_rounds + round_.number + 1
        end = time.monotonic() + self._timeout
        next_check = time.monotonic() + _LIVENESS_SECONDS
        while int(counters[counter]) < target:
            now = time.monotonic()
            reason = "timed out" if now > end else ""
            if not reason and now > next_check:
                reason = "" if _is_alive(int(counters[_PROCESS])) else f"the process of rank {message.peer} exited"
                next_check = now + _LIVENESS_SECONDS
            if reason:
                text = failed_wait(round_, message, self._rank, sends, self._timeout, reason)
                raise TransportError(text, message.peer)
            time.sleep(_POLL_SECONDS)


def _no_synchronization() -> None:
    """Do nothing: a copy by the CPU is complete when it returns."""


def _create_segment(path: Path, num_bytes: int) -> Tensor:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)  # a full /dev/shm fails here, not later with a bus error
    except OSError as error:
        os.close(descriptor)
        path.unlink()
        raise UserError(
            f"weight_sync.transport=shared_memory: {SHARED_MEMORY} has too little space for {num_bytes} bytes "
            f"({error.strerror})",
            remedy="use a smaller weight_sync.bucket_bytes, or weight_sync.transport=gloo",
        ) from error
    return _map_segment(descriptor)


def _open_segment(path: Path) -> Tensor:
    return _map_segment(os.open(path, os.O_RDWR))


def _map_segment(descriptor: int) -> Tensor:
    """Return the file's memory as uint8; the mapping lives as long as the tensor."""
    memory = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # a zombie, or dead

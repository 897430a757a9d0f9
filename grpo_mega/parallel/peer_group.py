"""Ranks that speak with each other: those of the job, or those of the job and of its engine servers together.

`job_peer_group` is torch.distributed's default group. `join_peers` makes a group beside it, over a store that one of
its ranks has opened, so that programs that each have a default group of their own can meet; it touches neither. What
ranks tell each other is pickled, but nothing that is read can call anything: only plain values and the project's own
dataclasses, arrays of numbers and dtypes are made. Asserted by tests/parallel/test_world.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (  # torch.distributed has these names, and its type hints do not
    BroadcastOptions,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
)

T = TypeVar("T")

_LOOK_SECONDS = 1.0  # between two looks whether somebody is known to be gone
_ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
}


def _nobody_is_gone() -> None:
    pass


@dataclass(frozen=True)
class PeerGroup:
    """Some ranks, this one among them. `check_others` raises RuntimeError when a rank is known to be gone; every wait
    for others looks there now and then."""

    group: dist.ProcessGroup
    store: Store
    check_others: Callable[[], None] = _nobody_is_gone

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def gather(self, value: T) -> list[T]:
        """Collective: one object from every rank, in the order of the ranks."""
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([mine.numel()]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: mine.numel()] = mine
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(found, padded, group=self.group)
        return [
            cast("T", read_plain(each[: int(size)].numpy().tobytes())) for each, size in zip(found, sizes, strict=True)
        ]

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Collective: the tensor of rank `source`, into everybody's."""
        options = BroadcastOptions()
        options.rootRank = source
        self.group.broadcast([tensor], options).wait()

    def await_keys(self, keys: Sequence[str], seconds: float) -> None:
        """Until all are in the store.

        Raises:
            RuntimeError: not in time, the store is gone, or another rank is.
        """
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            try:
                self.store.wait(list(keys), timedelta(seconds=max(0.001, min(_LOOK_SECONDS, left))))
                return
            except dist.DistStoreError:
                self.check_others()
                if left <= _LOOK_SECONDS:
                    raise


def job_peer_group() -> PeerGroup:
    """All ranks of this program."""
    group = dist.group.WORLD
    assert group is not None, "the job's process group exists"
    return PeerGroup(group, dist.distributed_c10d._get_default_store())


def open_store(timeout_seconds: float) -> TCPStore:
    """On a port of its own, for all interfaces of this machine."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds))


def find_store(address: str, port: int, timeout_seconds: float) -> TCPStore:
    """One that another rank has opened.

    Raises:
        RuntimeError: nobody answers there.
    """
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds))


def join_peers(
    store: Store,
    rank: int,
    names: Sequence[str],
    timeout_seconds: float,
    check_others: Callable[[], None] = _nobody_is_gone,
) -> PeerGroup:
    """Collective over `len(names)` ranks of any programs.

    Args:
        store: the same for all.
        rank: of this one.
        names: who each of them is, for messages.
        timeout_seconds: of every wait.
        check_others: as in `PeerGroup`.

    Raises:
        RuntimeError: names who did not come.
    """
    keys = [f"here/{each}" for each in range(len(names))]
    store.set(keys[rank], "")
    meeting = PeerGroup(cast("dist.ProcessGroup", None), store, check_others)
    try:
        meeting.await_keys(keys, timeout_seconds)
    except dist.DistStoreError as error:
        absent = ", ".join(name for name, key in zip(names, keys, strict=True) if not store.check([key]))
        raise RuntimeError(f"{names[rank]} waited in vain for {absent or 'nobody, at the second look'}") from error
    return PeerGroup(_make_group(store, rank, len(names), timedelta(seconds=timeout_seconds)), store, check_others)


def _make_group(store: Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """Gloo for what lies on the host, with CUDA NCCL for what lies on a device."""
    group = dist.ProcessGroup(PrefixStore("group", store), rank, size)
    kinds = dist.ProcessGroup.BackendType
    gloo = ProcessGroupGloo(PrefixStore("gloo", store), rank, size, timeout)
    gloo._set_sequence_number_for_group()
    group._set_default_backend(kinds.GLOO)
    group._register_backend(torch.device("cpu"), kinds.GLOO, gloo)
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        nccl = dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, options)
        nccl._set_sequence_number_for_group()
        group._register_backend(torch.device("cuda"), kinds.NCCL, nccl)
    return group


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAYS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module.startswith("grpo_mega."):
            found = getattr(importlib.import_module(module), name, None)
            if isinstance(found, type) and dataclasses.is_dataclass(found):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is nothing that ranks tell each other")


def read_plain(pickled: bytes) -> object:
    """What was pickled, if it is made of plain values, the project's dataclasses, arrays and dtypes.

    Raises:
        pickle.UnpicklingError: it is made of something else (names it).
    """
    return _PlainUnpickler(io.BytesIO(pickled)).load()

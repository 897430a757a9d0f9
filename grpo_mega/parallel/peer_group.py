"""Groups of ranks that exchange objects and tensors: the ranks of a job, alone or with those of its engine servers.

`job_peer_group` is torch.distributed's default group. `join_peers` forms a second group over a store that one rank
opened, so that several programs, each with its own default group, can communicate. It changes no default group.
Objects are pickled, but reading them cannot run code: the unpickler accepts only plain values, the project's
dataclasses, numeric arrays and dtypes. Asserted by tests/parallel/test_peer_group.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
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

_POLL_SECONDS = 1.0  # between two calls of `check_others`
_FAILURE_KEY = "failure"  # of the store
_ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
}


class PeerFailedError(RuntimeError):
    """Another rank of the group has reported a failure, after which the group cannot be used any more."""


def _no_check() -> None:
    pass


@dataclass(frozen=True)
class PeerGroup:
    """A group of ranks that includes this rank.

    `check_others` raises RuntimeError when another rank is known to be gone; long waits call it every second. Functions
    of torch.distributed are not used: they replace the error of a group that it does not know by a ValueError.
    """

    group: dist.ProcessGroup
    store: Store
    check_others: Callable[[], None] = _no_check

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def gather(self, value: T) -> list[T]:
        """Return one object from every rank, in the order of the ranks. Collective."""
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self.group.allgather([sizes], [torch.tensor([mine.numel()])]).wait()
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: mine.numel()] = mine
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        self.group.allgather([found], [padded]).wait()
        return [
            cast("T", read_plain(each[: int(size)].numpy().tobytes())) for each, size in zip(found, sizes, strict=True)
        ]

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copy the tensor of rank `source` into the tensors of all other ranks. Collective."""
        options = BroadcastOptions()
        options.rootRank = source
        self.group.broadcast([tensor], options).wait()

    def connect(self, device: torch.device) -> None:
        """Connect all ranks for messages between tensors of `device`, by one sum over all ranks. Collective.

        NCCL connects a group at its first use, which all ranks must make together. Messages between two ranks may not
        be that use: a rank that sends and receives none in the first round would not take part, and the others would
        wait for it.
        """
        self.group.allreduce([torch.zeros(1, device=device)]).wait()

    def report_failure(self, reason: str) -> None:
        """Have all ranks that wait in `await_keys` raise PeerFailedError with this text. Does nothing without a store.

        For a group with a store of its own, which is not used again.
        """
        report_failure(self.store, reason)

    def await_keys(self, keys: Sequence[str], seconds: float) -> None:
        """Wait until all keys are in the store.

        Raises:
            PeerFailedError: another rank has called `report_failure`.
            RuntimeError: a key is missing after `seconds`, or the store or another rank is gone.
        """
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            try:
                self.store.wait(list(keys), timedelta(seconds=max(0.001, min(_POLL_SECONDS, left))))
                return
            except dist.DistStoreError:
                self.check_others()
                if self.store.check([_FAILURE_KEY]):
                    raise PeerFailedError(self.store.get(_FAILURE_KEY).decode(errors="replace")) from None
                if left <= _POLL_SECONDS:
                    raise


def report_failure(store: Store, reason: str) -> None:
    """Have all ranks that wait for keys of this store raise PeerFailedError with `reason`."""
    with suppress(RuntimeError):
        store.set(_FAILURE_KEY, reason)


def job_peer_group() -> PeerGroup:
    """Return the group of all ranks of this job."""
    group = dist.group.WORLD
    assert group is not None, "the job's process group exists"
    return PeerGroup(group, dist.distributed_c10d._get_default_store())


def find_store(address: str, port: int, timeout_seconds: float) -> TCPStore:
    """Connect to a store that another rank opened.

    Raises:
        RuntimeError: no store answers at this address.
    """
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds))


def join_peers(
    store: Store,
    rank: int,
    names: Sequence[str],
    timeout_seconds: float,
    check_others: Callable[[], None] = _no_check,
) -> PeerGroup:
    """Form a group of `len(names)` ranks, which may belong to different programs. Collective.

    Args:
        store: connection to one store, the same for all ranks.
        rank: of this process in the group.
        names: of all ranks, for messages.
        timeout_seconds: limit of every wait.
        check_others: as in `PeerGroup`.

    Raises:
        RuntimeError: not all ranks joined in time (names the missing ranks).
    """
    keys = [f"here/{each}" for each in range(len(names))]
    store.set(keys[rank], "")
    pending = PeerGroup(cast("dist.ProcessGroup", None), store, check_others)
    try:
        pending.await_keys(keys, timeout_seconds)
    except dist.DistStoreError as error:
        missing = ", ".join(name for name, key in zip(names, keys, strict=True) if not store.check([key]))
        reason = f"waiting for {missing}" if missing else "although all ranks had joined when they were checked again"
        raise RuntimeError(f"{names[rank]} timed out after {timeout_seconds:g} s, {reason}") from error
    return PeerGroup(_make_group(store, rank, len(names), timedelta(seconds=timeout_seconds)), store, check_others)


def _make_group(store: Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """Make a group that uses gloo for tensors on the host and, with CUDA, NCCL for tensors on a device."""
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
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in rank-to-rank messages")


def read_plain(pickled: bytes) -> object:
    """Unpickle an object made of plain values, the project's dataclasses, arrays and dtypes.

    Raises:
        pickle.UnpicklingError: the object contains another type or a function (names it).
    """
    return _PlainUnpickler(io.BytesIO(pickled)).load()

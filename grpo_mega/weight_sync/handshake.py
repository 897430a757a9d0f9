"""What all ranks must agree on before and during a sync, and which of them is missing when one does not answer."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch

from grpo_mega.interfaces import HeldSlice, SinkRegion
from grpo_mega.parallel.peer_group import PeerGroup, read_plain
from grpo_mega.types import WeightMismatchError
from grpo_mega.weight_sync.slice_table import Holdings, WireTensor, holdings, join, merged, volumes

T = TypeVar("T")


class StragglerBarrier:
    """Who has come how far, in the ranks' store: a rank that waits in vain says for whom."""

    def __init__(self, name: str, where: list[str], timeout_seconds: float, world: PeerGroup) -> None:
        """`where[r]` says who rank r is."""
        self._name, self._where, self._phase = name, where, 0
        self._timeout, self._world = timeout_seconds, world

    @property
    def rank(self) -> int:
        return self._world.rank

    def gather(self, value: T, what: str) -> list[T]:
        """One object from every rank.

        Raises:
            RuntimeError: names the ranks that did not come in time.
        """
        self._phase += 1
        try:
            self._world.store.set(self._key(self._world.rank), what)
            # Before the collective: its own limit is that of the process group, and it would not say for whom.
            self._world.await_keys([self._key(rank) for rank in range(len(self._where))], self._timeout)
            return self._world.gather(value)
        except RuntimeError as error:
            self._world.check_others()
            raise RuntimeError(f"weight sync, {what}: {self.missing_ranks()} ({error})") from error

    def missing_ranks(self) -> str:
        """For a message: the ranks that have not reached the present phase."""
        try:
            missing = [r for r in range(len(self._where)) if not self._world.store.check([self._key(r)])]
        except RuntimeError:  # the store lives in rank 0
            missing = [0]
        names = ", ".join(f"rank {r} ({self._where[r]})" for r in missing) or "nobody, at the second look"
        rank = self._world.rank
        return f"rank {rank} ({self._where[rank]}) waited in vain for {names}"

    def _key(self, rank: int) -> str:
        return f"{self._name}/{self._phase}/{rank}"


@dataclass(frozen=True)
class SyncEnds:
    """Both ends of a sync over all ranks. `dtypes`: of each tensor as it travels, the engine's."""

    tensors: dict[str, WireTensor]
    dtypes: dict[str, torch.dtype]
    held: Holdings
    wanted: Holdings


@dataclass(frozen=True)
class _Report:
    """What one rank tells the others; `fault` instead, where it cannot. `held` and `wanted` are pickled holdings of no
    rank, the same bytes on ranks that hold and want the same."""

    held: bytes
    wanted: bytes
    dtypes: dict[str, torch.dtype]
    codes: dict[str, torch.dtype] = field(default_factory=dict)
    fault: str | None = None


def agree_on_ends(
    shapes: dict[str, tuple[int, ...]],
    shards: Sequence[HeldSlice],
    regions: Sequence[SinkRegion],
    replicas: Sequence[Sequence[int]],
    attendance: StragglerBarrier,
) -> SyncEnds:
    """Every rank's shards and regions, on every rank.

    Args:
        shapes: of every tensor of the checkpoint.
        shards: of this rank.
        regions: of this rank.
        replicas: ranks of each engine.
        attendance: of the job.

    Raises:
        WeightMismatchError: an engine asks for what the policy does not have, has no place for something, wants a
            tensor in two dtypes, or FP8 codes as numbers (names them).
    """
    dtypes = dict.fromkeys(shapes, torch.float32)
    mine = _report(shapes, shards, regions, attendance.rank)
    reports = attendance.gather(mine, "exchanging layouts")
    if faults := [report.fault for report in reports if report.fault]:
        raise WeightMismatchError(f"the engine asks for what the policy does not have: {'; '.join(faults[:3])}")
    for rank, report in enumerate(reports):
        for name, dtype in report.dtypes.items():
            if name in dtypes and any(name in r.dtypes and r.dtypes[name] != dtype for r in reports):
                raise WeightMismatchError(f"engine ranks want {name} in several dtypes; rank {rank} in {dtype}")
            dtypes[name] = dtype
    _check_codes(reports, dtypes)
    tensors = {name: WireTensor(shape, dtypes[name].itemsize) for name, shape in shapes.items()}
    ends = SyncEnds(tensors, dtypes, _of_all([r.held for r in reports]), _of_all([r.wanted for r in reports]))
    _check_complete(ends, replicas)
    return ends


def _report(
    shapes: dict[str, tuple[int, ...]], shards: Sequence[HeldSlice], regions: Sequence[SinkRegion], rank: int
) -> _Report:
    numbered = {name: WireTensor(shape, 1) for name, shape in shapes.items()}
    try:
        held = holdings(numbered, [held.hf for held in shards], rank)
        wanted = holdings(numbered, [region.placement.hf for region in regions], rank)
        return _Report(
            pickle.dumps(held.on(())),
            pickle.dumps(wanted.on(())),
            {region.placement.hf.name: region.dtype for region in regions},
            {held.hf.name: held.dtype for held in shards if held.dtype.itemsize == 1},
        )
    except ValueError as error:
        return _Report(b"", b"", {}, fault=str(error))


def _check_codes(reports: Sequence[_Report], dtypes: dict[str, torch.dtype]) -> None:
    """Codes mean nothing without their scales: they are not converted on the way, and nothing becomes codes by it."""
    codes = {name: dtype for report in reports for name, dtype in report.codes.items()}
    for name, dtype in dtypes.items():
        if name in codes and dtype != codes[name]:
            raise WeightMismatchError(
                f"the policy has codes of {name} in {codes[name]}, the engine wants it in {dtype}"
            )
        if name not in codes and dtype.itemsize == 1:
            raise WeightMismatchError(f"the engine wants {name} in codes of {dtype}, which the policy does not make")


def _of_all(pickled: Sequence[bytes]) -> Holdings:
    """Rank r's holdings are `pickled[r]`; equal ones are read once."""
    alike: dict[bytes, list[int]] = {}
    for rank, each in enumerate(pickled):
        alike.setdefault(each, []).append(rank)
    return join([cast("Holdings", read_plain(each)).on(ranks) for each, ranks in alike.items()])


def _check_complete(ends: SyncEnds, replicas: Sequence[Sequence[int]]) -> None:
    """Each engine takes every element of every tensor somewhere."""
    names = list(ends.tensors)
    full = [int(torch.Size(tensor.shape).numel()) for tensor in ends.tensors.values()]
    for ranks in replicas:
        boxes = merged(ends.wanted.of(ranks))
        taken = [0] * len(names)
        for tensor, size in zip(boxes.tensors.tolist(), volumes(boxes.starts, boxes.ends).tolist(), strict=True):
            taken[tensor] += size
        missing = [f"{names[i]} ({taken[i]} of {full[i]} elements)" for i in range(len(names)) if taken[i] < full[i]]
        if missing:
            raise WeightMismatchError(
                f"the engine of ranks {ranks[0]} to {ranks[-1]} has no place for {', '.join(missing[:3])} "
                f"({len(missing)} tensors of the policy)"
            )

"""Brings the policy's present weights into the engines and proves that they arrived.

A plan is made once from both ends' layouts, on every rank, and its hash compared before the first use. Each push
carries it out (execute.py), has the engine rebuild what it derives, and compares digests (verify.py). A failure on any
rank is raised on all of them: nobody samples from weights that are wrong or half new.
An engine whose loader cannot be recorded is given whole tensors, one bucket at a time, and that is said once.
Knows policy and engine only through `WeightSource` and `WeightSink`. Where engines are servers, the ranks are those of
the job, whose sinks are empty, and of the servers, whose sources are.
Asserted by tests/parallel/test_sync_ranks.py and tests/engine/test_weight_sync.py, with injected faults.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.interfaces import HeldSlice, WeightSink, WeightSource
from grpo_mega.models.digest import combined_digest
from grpo_mega.parallel.peer_group import PeerGroup, job_peer_group
from grpo_mega.types import TensorSlice, WeightMismatchError
from grpo_mega.weight_sync.executor import Execution
from grpo_mega.weight_sync.handshake import StragglerBarrier, SyncEnds, agree_on_ends
from grpo_mega.weight_sync.plan import ReshardPlan, plan_reshard
from grpo_mega.weight_sync.rank_schedule import schedule_of_rank
from grpo_mega.weight_sync.transports.base import TransportError
from grpo_mega.weight_sync.transports.factory import TransportKind, make_transports, node_numbers, transport_kinds
from grpo_mega.weight_sync.verify import (
    PieceDigests,
    differing_tensors,
    localize_mismatches,
    piece_digests,
    sink_digests,
    source_digests,
)

log = logging.getLogger("grpo_mega.weight_sync")

FullTensors = Callable[[int], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class SyncReport:
    """One sync as this rank saw it. `written_bytes` went into its engine, or, where engines are servers, from this rank
    into theirs; `received_bytes` of them came here from other ranks. `policy_digest` is one word for all weights, the
    same for every layout."""

    seconds: float
    verify_seconds: float
    written_bytes: int
    received_bytes: int
    policy_digest: str


@dataclass(frozen=True)
class SyncSettings:
    """`bucket_bytes`: what a rank sends and receives at a time. `timeout_seconds`: limit of every wait."""

    bucket_bytes: int
    timeout_seconds: float
    transport: TransportKind = "auto"


class WeightSync:
    """Built collectively, once, when policy and engines exist."""

    def __init__(
        self,
        source: WeightSource,
        full_tensors: FullTensors,
        sink: WeightSink,
        *,
        source_group: dist.ProcessGroup,
        replicas: Sequence[Sequence[int]],
        replica_group: dist.ProcessGroup,
        settings: SyncSettings,
        where: str,
        world: PeerGroup | None = None,
        announce: Callable[[int, bool], None] | None = None,
    ) -> None:
        """Collective.

        Args:
            source: the policy's end on this rank.
            full_tensors: every tensor, whole, bucket by bucket; for engines that are streamed to.
            sink: the engine's end on this rank.
            source_group: the ranks that hold one copy of the policy.
            replicas: ranks of each engine.
            replica_group: the ranks of this engine in this program.
            settings: see there.
            where: this rank's coordinates, for messages.
            world: all ranks of both ends; None: those of the job.
            announce: starts the push of a version on ranks of other programs (`SyncPeers.announce`); None: there are
            none.

        Raises:
            WeightMismatchError: the two ends do not fit (names tensors).
            RuntimeError: ranks made different plans.
        """
        self._source, self._full_tensors, self._sink = source, full_tensors, sink
        self._source_group, self._replica_group, self._settings = source_group, replica_group, settings
        self._world = world if world is not None else job_peer_group()
        self._announce = announce
        self._places = places = self._world.gather(where)
        self._attendance = StragglerBarrier("weight_sync", places, settings.timeout_seconds, self._world)
        self.count = 0
        """Pushes that succeeded."""
        offers = self._attendance.gather((sink.supports_slices, sink.streaming_reason), "asking engines")
        reasons = [reason for supported, reason in offers if not supported]
        if reasons:
            log.warning("engines get whole tensors, and what they hold is not proven: %s", reasons[0])
        self._ends: SyncEnds | None = None
        if not reasons:
            self._prepare(replicas)
        elif world is not None:
            raise RuntimeError(f"engines that are servers get slices of tensors only, and these cannot: {reasons[0]}")

    def _prepare(self, replicas: Sequence[Sequence[int]]) -> None:
        regions = self._sink.layout()
        self._ends = agree_on_ends(self._source.hf_shapes(), self._source.shards(), regions, replicas, self._attendance)
        nodes = node_numbers(self._attendance.gather)
        ends = self._ends
        self.plan: ReshardPlan = plan_reshard(ends.tensors, ends.held, ends.wanted, nodes, self._settings.bucket_bytes)
        check_same_plan(self._attendance.gather(self.plan.hash, "comparing plans"))
        rank = self._world.rank
        kinds = transport_kinds(self._settings.transport)
        mine = schedule_of_rank(self.plan, rank, ends.dtypes, kinds)
        transports, buffer_bytes = make_transports(mine.turns, self._settings.timeout_seconds, self._world)
        self.execution = Execution(mine, transports, buffer_bytes, self.plan.hash, self._sink)
        written = self.plan.dst == rank if regions else self.plan.src == rank
        self._written_bytes = int(self.plan.transfer_bytes[written].sum())
        self._received_bytes = int(self.plan.received_bytes()[rank])
        self._holders = sorted({rank for each in np.unique(ends.held.rank_set) for rank in ends.held.rank_sets[each]})

    def push(self, policy_version: int, *, verify: bool) -> SyncReport:
        """Every rank calls it together.

        Raises:
            WeightMismatchError: on every rank; an engine holds something else than the policy.
            RuntimeError: on every rank that can; a rank died, stalled or failed (names both sides).
        """
        start = time.perf_counter()
        if self._announce is not None:
            self._announce(policy_version, verify)
        if self._ends is None:
            return self._stream(policy_version)
        shards = self._source.shards()
        faults = self._carry_out(shards, policy_version)
        everyone = self._attendance.gather((faults, self._sink.policy_version), "ending the update")
        self._raise_faults([fault for found, _ in everyone for fault in found])
        check_versions([version for _, version in everyone], policy_version)
        loaded = time.perf_counter()
        digests = self._broadcast_digests(source_digests(shards, self._ends.dtypes, self._source_group))
        if verify:
            self._verify(shards, digests)
        end = time.perf_counter()
        self.count += 1
        return SyncReport(
            end - start, end - loaded, self._written_bytes, self._received_bytes, combined_digest(digests)
        )

    def _carry_out(self, shards: Sequence[HeldSlice], policy_version: int) -> list[str]:
        """What went wrong on this rank; after a fault the engine stays in the update, and refuses to sample."""
        try:
            self._sink.begin_update()
            faults = self.execution.run(shards, policy_version)
            if not faults:
                self._sink.end_update(policy_version)
        except TransportError as error:
            peer = f"rank {error.peer} is {self._places[error.peer]}"
            raise RuntimeError(f"weight sync of version {policy_version}: {error}; {peer}") from error
        except (RuntimeError, ValueError) as error:  # the other ranks hear of it before they wait for this one
            return [f"the engine of rank {self._world.rank} failed: {error}"]
        return faults

    def _broadcast_digests(self, digests: dict[str, int]) -> dict[str, int]:
        """The policy's digests, on every rank."""
        if len(self._holders) == self._world.size:
            return digests
        told = torch.tensor(list(digests.values()), dtype=torch.int64)
        self._world.broadcast(told, self._holders[0])
        return dict(zip(digests, told.tolist(), strict=True))

    def _verify(self, shards: Sequence[HeldSlice], expected: dict[str, int]) -> None:
        assert self._ends is not None, "there is a plan"
        held, stale, failed = self._sink_digests()
        replica: list[dict[TensorSlice, int]] = [{} for _ in range(self._replica_group.size())]
        dist.all_gather_object(replica, held, group=self._replica_group)
        findings = self._attendance.gather((differing_tensors(expected, replica), stale, failed), "comparing digests")
        self._raise_faults([fault for _, _, found in findings for fault in found])
        suspects = {name for names, _, _ in findings for name in names}
        faults = [fault for _, stales, _ in findings for fault in stales]
        if suspects:
            faults += self._locate(suspects, shards) or [
                f"{sorted(suspects)}: what the policy's shards hold is not what travels"
            ]
        self._raise_faults(faults)

    def _sink_digests(self) -> tuple[dict[TensorSlice, int], list[str], list[str]]:
        """Digests of what this rank's engine holds, what it computes from older weights, and why it cannot say."""
        try:
            held = sink_digests(self._sink, self._sink.layout())
            stale = [f"{self._derived(name)}: {what}" for name, what in self._sink.probe().items()]
        except RuntimeError as error:  # the other ranks hear of it before they wait for this one
            return {}, [], [f"the engine of rank {self._world.rank} failed in the proof: {error}"]
        return held, stale, []

    def _locate(self, suspects: set[str], shards: Sequence[HeldSlice]) -> list[str]:
        assert self._ends is not None, "there is a plan"
        mine = piece_digests(self.plan, self._world.rank, suspects, shards, self._sink, self._ends.dtypes)
        everywhere: list[PieceDigests] = self._attendance.gather(mine, "looking for the slice that differs")
        return localize_mismatches(self.plan, suspects, everywhere)

    def _derived(self, parameter: str) -> str:
        """The slices whose derived copy `probe` looked at under this name."""
        regions = (r for r in self._sink.layout() if r.kind == "derived" and r.placement.local.name == parameter)
        slices = ", ".join(str(r.placement.hf) for r in regions) or parameter
        return f"{slices} on rank {self._world.rank}: the kernel computes from other weights than it stores"

    def _stream(self, policy_version: int) -> SyncReport:
        """Whole tensors through the engine's own loader. The digest is the policy's alone."""
        start = time.perf_counter()
        sent = 0
        self._sink.begin_update()
        for name, tensor in self._full_tensors(self._settings.bucket_bytes):
            self._sink.load(name, tensor)
            sent += tensor.nbytes
        self._sink.end_update(policy_version)
        shards = self._source.shards()
        dtypes = {held.hf.name: held.dtype for held in shards}
        heard: dict[str, object] = {}
        for part in self._attendance.gather(dtypes, "ending the update"):
            heard |= part
        dtypes = {name: heard[name] for name in self._source.hf_shapes()}  # type: ignore[misc]
        digests = source_digests(shards, dtypes, self._source_group)
        self.count += 1
        return SyncReport(time.perf_counter() - start, 0.0, sent, sent, combined_digest(digests))

    def _raise_faults(self, faults: list[str]) -> None:
        if faults:
            raise WeightMismatchError("weight sync: " + "; ".join(faults[:5]) + f" ({len(faults)} in all)")


def check_same_plan(hashes: Sequence[str]) -> None:
    """Raises RuntimeError when two ranks made different plans; names both."""
    for rank, plan_hash in enumerate(hashes):
        if plan_hash != hashes[0]:
            raise RuntimeError(
                f"weight sync: rank 0 made plan {hashes[0]}, rank {rank} plan {plan_hash}; ranks must run one version "
                "of the program on one config"
            )


def check_versions(found: Sequence[int], sent: int) -> None:
    """Raises WeightMismatchError when an engine reports another version than the policy's."""
    for rank, version in enumerate(found):
        if version != sent:
            raise WeightMismatchError(
                f"weight sync: the engine of rank {rank} reports version {version}, the policy sent version {sent}"
            )

"""Transfers the policy's present weights into the engines, and verifies that they arrived.

A plan is made once, on every rank, from the layouts of policy and engines; the ranks compare its hash. Each push
executes the plan (executor.py), lets the engine recompute derived values, and compares digests (verifier.py). A failure
on any rank is raised on all of them, so no engine samples from wrong or partly updated weights. After sampling
(`verify_after_sampling`), or with engine servers before the next push, the engines' digests are compared with those of
the push again: the weights that sampled are those that were verified.

An engine whose loader cannot be recorded receives whole tensors, one bucket at a time; a warning states the reason
once.

Policy and engine are known only through `WeightSource` and `WeightSink`. With engine servers, the ranks are those of
the job, whose sinks are empty, followed by those of the servers, whose sources are empty. Asserted by
tests/parallel/test_sync_ranks.py and tests/engine/test_weight_sync.py, with injected faults.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.interfaces import HeldSlice, WeightSink, WeightSource
from grpo_mega.models.digest import combined_digest
from grpo_mega.parallel.peer_group import PeerGroup, job_peer_group
from grpo_mega.types import WeightMismatchError
from grpo_mega.weight_sync.digest_comparison import source_digests
from grpo_mega.weight_sync.executor import ScheduleExecutor
from grpo_mega.weight_sync.handshake import SyncLayouts, exchange_layouts
from grpo_mega.weight_sync.plan import ReshardPlan, plan_reshard
from grpo_mega.weight_sync.rank_schedule import schedule_of_rank
from grpo_mega.weight_sync.straggler_barrier import StragglerBarrier
from grpo_mega.weight_sync.transports.base import TransportError
from grpo_mega.weight_sync.transports.factory import make_transports, node_numbers, transport_kinds
from grpo_mega.weight_sync.transports.kinds import TransportKind
from grpo_mega.weight_sync.verifier import SyncVerifier, raise_faults

log = logging.getLogger("grpo_mega.weight_sync")

FullTensors = Callable[[int], Iterator[tuple[str, Tensor]]]
"""`full_tensors(bucket_bytes)` yields (name, whole tensor) in checkpoint order (`Policy.full_tensors`)."""


@dataclass(frozen=True)
class SyncReport:
    """Measurements of one push on this rank.

    `written_bytes` were written into this rank's engine; with engine servers, they were sent from this rank. Of these,
    `received_bytes` came from other ranks. `verify_seconds` is the part of `seconds` spent on digests. `policy_digest`
    is one digest of all weights, the same for every layout.
    """

    seconds: float
    verify_seconds: float
    written_bytes: int
    received_bytes: int
    policy_digest: str


@dataclass(frozen=True)
class SyncSettings:
    """Settings of a sync.

    Args:
        bucket_bytes: limit of what a rank sends and receives in one round.
        timeout_seconds: limit of every wait.
        transport: `weight_sync.transport`.
    """

    bucket_bytes: int
    timeout_seconds: float
    transport: TransportKind = "auto"


class WeightSync:
    """The connection between a policy and its engines. Built collectively, once."""

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
            full_tensors: every tensor, whole, for engines that do not support slices.
            sink: the engine's end on this rank.
            source_group: the ranks that hold one copy of the policy.
            replicas: ranks of each engine.
            replica_group: the ranks of this engine in this program.
            settings: of the sync.
            where: this rank's coordinates, for messages.
            world: all ranks of policy and engines; None: the ranks of the job.
            announce: `SyncPeers.announce`; None: there are no ranks of other programs.

        Raises:
            WeightMismatchError: the tensors of policy and engines do not match (names them).
            RuntimeError: ranks made different plans, or an engine server does not support slices.
        """
        self._source, self._full_tensors, self._sink = source, full_tensors, sink
        self._source_group, self._replica_group, self._settings = source_group, replica_group, settings
        self._world = world if world is not None else job_peer_group()
        self._announce = announce
        self.count = 0
        """Number of pushes that succeeded."""
        self._last: tuple[int, bool] | None = None  # version of the last push, and whether it was verified
        self._digests: dict[str, int] | None = None  # of the last push, if it was verified
        self._has_servers = world is not None
        self._layouts: SyncLayouts | None = None
        try:
            self._meet(replicas, where)
        except WeightMismatchError:  # on every rank
            raise
        except RuntimeError as error:
            if world is not None:
                world.report_failure(f"{where}: {error}")  # the others wait for this rank
            raise

    def _meet(self, replicas: Sequence[Sequence[int]], where: str) -> None:
        """Collective: exchange what the ranks are and hold, and make the plan."""
        self._where = self._world.gather(where)
        self._barrier = StragglerBarrier("weight_sync", self._where, self._settings.timeout_seconds, self._world)
        support = self._barrier.gather((self._sink.supports_slices, self._sink.streaming_reason), "comparing engines")
        reasons = [reason for supports_slices, reason in support if not supports_slices]
        if reasons:
            log.warning("engines receive whole tensors, and their weights are not verified: %s", reasons[0])
        if not reasons:
            self._prepare(replicas)
        elif self._has_servers:
            raise RuntimeError(f"engine servers must support slices of tensors: {reasons[0]}")

    def _prepare(self, replicas: Sequence[Sequence[int]]) -> None:
        """Collective: exchange layouts, make the plan, and construct transports, executor and verifier."""
        regions = self._sink.layout()
        source, settings, rank = self._source, self._settings, self._world.rank
        layouts = exchange_layouts(source.hf_shapes(), source.shards(), regions, replicas, self._barrier)
        self._layouts = layouts
        nodes = node_numbers(self._barrier.gather)
        self.plan: ReshardPlan = plan_reshard(
            layouts.tensors, layouts.held, layouts.wanted, nodes, settings.bucket_bytes
        )
        check_same_plan(self._barrier.gather(self.plan.hash, "comparing plans"))
        schedule = schedule_of_rank(self.plan, rank, layouts.dtypes, transport_kinds(settings.transport))
        transports, buffer_bytes = make_transports(schedule.rounds, settings.timeout_seconds, self._world)
        self.executor = ScheduleExecutor(schedule, transports, buffer_bytes, self.plan.hash, self._sink)
        self._verifier = SyncVerifier(self._sink, self.plan, layouts.dtypes, self._barrier, self._replica_group)
        written = self.plan.dst == rank if regions else self.plan.src == rank
        self._written_bytes = int(self.plan.transfer_bytes[written].sum())
        self._received_bytes = int(self.plan.traffic.received_bytes()[rank])
        held = layouts.held
        self._holders = sorted({each for rank_set in np.unique(held.rank_set) for each in held.rank_sets[rank_set]})

    def push(self, policy_version: int, *, verify: bool) -> SyncReport:
        """Collective: transfer the policy's current weights to all engines.

        With engine servers, a failure on this rank is reported to the ranks that wait for it.

        Args:
            policy_version: the number of updates behind the weights.
            verify: compare the digests of policy and engines.

        Raises:
            WeightMismatchError: on every rank; an engine's weights differ from the policy's, or it failed to take
                them.
            RuntimeError: on every rank that is still running; a rank exited, timed out or failed (names both ranks).
        """
        if self._announce is None:
            return self._push(policy_version, verify=verify)
        try:
            self._announce(policy_version, verify)
            return self._push(policy_version, verify=verify)
        except WeightMismatchError:  # on every rank
            raise
        except RuntimeError as error:
            self._world.report_failure(f"{self._where[self._world.rank]}: {error}")
            raise

    def _push(self, policy_version: int, *, verify: bool) -> SyncReport:
        start = time.perf_counter()
        if self._layouts is None:
            return self._stream(policy_version)
        if self._has_servers:
            self._verify_again()
        self._digests = None
        shards = self._source.shards()
        own_faults = self._execute(shards, policy_version)
        outcomes = self._barrier.gather((own_faults, self._sink.policy_version), "ending the update")
        raise_faults([fault for faults, _ in outcomes for fault in faults])
        check_versions([version for _, version in outcomes], policy_version)
        loaded = time.perf_counter()
        digests = self._broadcast_digests(source_digests(shards, self._layouts.dtypes, self._source_group))
        if verify:
            self._verifier.verify(shards, digests)
        end = time.perf_counter()
        self.count, self._last, self._digests = self.count + 1, (policy_version, verify), digests if verify else None
        return SyncReport(
            end - start, end - loaded, self._written_bytes, self._received_bytes, combined_digest(digests)
        )

    def verify_after_sampling(self) -> None:
        """Compare the engines' digests with those of the last push, if that was verified. Collective.

        An engine that sleeps has no weights, so this comes before it sleeps. Servers take part in pushes only: with
        them this does nothing, and the next push begins with the comparison.

        Raises:
            WeightMismatchError: on every rank; the weights of an engine have changed since the push.
        """
        if not self._has_servers:
            self._verify_again()

    def _verify_again(self) -> None:
        if self._digests is not None:
            assert self._last is not None, "a push has set both"
            self._verifier.verify_again(self._digests, self._last[0])

    def describe_checks(self) -> str:
        """Describe what the last push checked and what it did not, for messages."""
        if self._last is None:
            return "no sync has run"
        version, verified = self._last
        if self._layouts is None:
            return f"version {version} was streamed through the engine's own loader, and nothing was verified"
        digests = (
            "the digests of policy and engine were equal"
            if verified
            else "the digests were not compared (weight_sync.verify)"
        )
        return (
            f"every rank reported version {version}; each of the {len(self._layouts.tensors)} tensors of the policy "
            f"has its place in the engine, and each parameter of the engine has its tensor; {digests}"
        )

    def _execute(self, shards: Sequence[HeldSlice], policy_version: int) -> list[str]:
        """Execute the plan and return the failures on this rank.

        After a failure the engine's update stays open, so the engine does not sample. A rank whose engine cannot begin
        an update takes part in all rounds, because other ranks wait for its messages.
        """
        faults = self._begin_update()
        try:
            faults += self.executor.run(shards, policy_version)
            if not faults:
                self._sink.end_update(policy_version)
        except TransportError as error:
            peer = f"rank {error.peer} is {self._where[error.peer]}"
            raise RuntimeError(f"weight sync of version {policy_version}: {error}; {peer}") from error
        except (RuntimeError, ValueError) as error:  # reported to all ranks, which would otherwise wait for this one
            return [*faults, self._engine_failed(error)]
        return faults

    def _begin_update(self) -> list[str]:
        try:
            self._sink.begin_update()
        except (RuntimeError, ValueError) as error:
            return [self._engine_failed(error)]
        return []

    def _engine_failed(self, error: Exception) -> str:
        return f"the engine of rank {self._world.rank} failed: {error}"

    def _broadcast_digests(self, digests: dict[str, int]) -> dict[str, int]:
        """Return the policy's digests on every rank, including ranks that hold no weights of the policy."""
        if len(self._holders) == self._world.size:
            return digests
        values = torch.tensor(list(digests.values()), dtype=torch.int64)
        self._world.broadcast(values, self._holders[0])
        return dict(zip(digests, values.tolist(), strict=True))

    def _stream(self, policy_version: int) -> SyncReport:
        """Pass whole tensors to the engine's own loader. The digest is that of the policy; nothing is verified."""
        start = time.perf_counter()
        num_bytes = num_own = 0
        own_elements = Counter[str]()
        for held in self._source.shards():
            own_elements[held.hf.name] += math.prod(held.hf.shape)
        self._sink.begin_update()
        for name, tensor in self._full_tensors(self._settings.bucket_bytes):
            self._sink.load(name, tensor)
            num_bytes += tensor.nbytes
            num_own += min(own_elements[name], tensor.numel()) * tensor.element_size()
        self._sink.end_update(policy_version)
        shards = self._source.shards()
        own_dtypes = {held.hf.name: held.dtype for held in shards}
        dtypes_by_name: dict[str, torch.dtype] = {}
        for part in self._barrier.gather(own_dtypes, "ending the update"):
            dtypes_by_name |= part
        dtypes = {name: dtypes_by_name[name] for name in self._source.hf_shapes()}
        digests = source_digests(shards, dtypes, self._source_group)
        self.count, self._last = self.count + 1, (policy_version, False)
        return SyncReport(time.perf_counter() - start, 0.0, num_bytes, num_bytes - num_own, combined_digest(digests))


def check_same_plan(hashes: Sequence[str]) -> None:
    """Check that all ranks made the same plan; `hashes[r]` is the hash of rank r's plan.

    Raises:
        RuntimeError: two hashes differ (names both ranks).
    """
    for rank, plan_hash in enumerate(hashes):
        if plan_hash != hashes[0]:
            raise RuntimeError(
                f"weight sync: rank 0 made plan {hashes[0]}, rank {rank} made plan {plan_hash}; all ranks must run the "
                "same version of the program with the same config"
            )


def check_versions(found: Sequence[int], sent: int) -> None:
    """Check that the engine of every rank reports the version that was sent; `found[r]` is that of rank r.

    Raises:
        WeightMismatchError: an engine reports another version (names the rank and both versions).
    """
    for rank, version in enumerate(found):
        if version != sent:
            raise WeightMismatchError(
                f"weight sync: the engine of rank {rank} reports version {version}, but the policy sent version {sent}"
            )

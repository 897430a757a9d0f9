"""A sync between real ranks, over each transport that works without a GPU.

The engines hold the policy's weights, extra memory is bounded, and every fault is named on every rank before an engine
can sample.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.parallel.topology import Topology
from grpo_mega.types import TensorSlice, WeightMismatchError
from grpo_mega.weight_sync.executor import ScheduleExecutor
from grpo_mega.weight_sync.sync import SyncReport, SyncSettings, WeightSync, check_same_plan, check_versions
from grpo_mega.weight_sync.transports import factory, process_vm_readv
from grpo_mega.weight_sync.transports.base import BucketMessage, Round
from grpo_mega.weight_sync.transports.kinds import TransportKind
from grpo_mega.weight_sync.transports.process_vm_readv import StridedRange
from grpo_mega.weight_sync.transports.shared_memory import SharedMemoryTransport
from tests.helpers.memory_ends import MemorySink, MemorySource, values
from tests.helpers.ranks import RankPool
from tests.helpers.weight_layouts import TENSORS, EngineLayout, engine, policy
from tools.gpu_checks.exchange import exchange_on_two_ranks

WORLD = 4
TOPOLOGY = Topology(WORLD, tp=2, pp=2, engine_tp=2)
BUCKET_BYTES = 128 * 1024  # many rounds

Layouts = tuple[dict[str, int], EngineLayout]
TP2PP2: Layouts = ({"tp": 2, "pp": 2}, EngineLayout(2))
EXPERTS: Layouts = ({"tp": 2, "ep": 4}, EngineLayout(4))
DATA_PARALLEL: Layouts = ({}, EngineLayout(4))


def open_sync(
    rank: int,
    sink: Any = None,
    layouts: Layouts = TP2PP2,
    transport: TransportKind = "shared_memory",
    seconds: float = 30.0,
    machines: int = 1,
    bucket_bytes: int = BUCKET_BYTES,
) -> tuple[MemorySource, Any, WeightSync]:
    """Return source, sink and sync of this rank. The ranks are spread over `machines` pretended machines."""
    axes, layout = layouts
    held, wanted = policy(Topology(WORLD, **axes)), engine(layout, WORLD)
    source = MemorySource(held, rank)
    sink = sink if sink is not None else MemorySink(wanted, rank)
    size = layout.tp * layout.dp
    replicas = [list(range(first, first + size)) for first in range(0, WORLD, size)]
    groups = [dist.new_group(ranks) for ranks in replicas]
    everyone = dist.new_group(range(WORLD))

    def gather_machines(gather: Callable[[str, str], list[str]]) -> list[int]:
        gather("", "")
        return [r * machines // WORLD for r in range(WORLD)]

    with mock.patch("grpo_mega.weight_sync.sync.node_numbers", gather_machines):
        sync = WeightSync(
            source,
            lambda bucket_bytes: iter((name, values(name, 1)) for name in TENSORS),
            sink,
            source_group=everyone,
            replicas=replicas,
            replica_group=groups[rank // size],
            settings=SyncSettings(bucket_bytes, seconds, transport),
            where=f"place {rank}",
        )
    return source, sink, sync


def run_syncs(
    rank: int, layouts: Layouts, transport: TransportKind, machines: int, bucket_bytes: int = BUCKET_BYTES
) -> dict[str, Any]:
    source, sink, sync = open_sync(rank, None, layouts, transport, machines=machines, bucket_bytes=bucket_bytes)
    reports: list[SyncReport] = []
    wrong: list[str] = []
    for version in (1, 2):
        source.set_version(version)
        reports.append(sync.push(version, verify=True))
        wrong += [
            str(hf) for hf, memory in sink.memory.items() if not torch.equal(memory, values(hf.name, version)[hf.index])
        ]
    bytes_stored = sum(memory.nbytes for memory in sink.memory.values())
    return {
        "reports": reports,
        "wrong": wrong,
        "stored": bytes_stored,
        "buffers": sync.executor.buffer_bytes,
        "links": sync.plan.traffic.bytes_by_link(),
        "rounds": sync.plan.num_buckets,
        "in_place": len(sync.executor._in_place),
        "mapped": [line for line in Path("/proc/self/maps").read_text().splitlines() if "/grpo_mega_" in line],
    }


@pytest.mark.parametrize(
    ("layouts", "transport", "machines"),
    [
        (TP2PP2, "shared_memory", 1),
        (TP2PP2, "gloo", 1),
        (EXPERTS, "auto", 2),
        (DATA_PARALLEL, "auto", 1),
    ],
    ids=["TP2PP2-shared_memory", "TP2PP2-gloo", "experts-two-machines", "same-process"],
)
def test_engines_hold_the_policys_weights_at_each_version_with_two_buckets_of_extra_memory(
    rank_pool: RankPool, layouts: Layouts, transport: TransportKind, machines: int
) -> None:
    for seen in rank_pool.call(WORLD, run_syncs, layouts, transport, machines):
        assert seen["wrong"] == []
        first, second = seen["reports"]
        assert first.written_bytes == second.written_bytes == seen["stored"]
        assert first.policy_digest != second.policy_digest
        assert seen["buffers"] <= 2 * BUCKET_BYTES + 64 * WORLD * 2
        assert all(line.endswith("(deleted)") for line in seen["mapped"]), "a killed job would leave its segments"
        if layouts is DATA_PARALLEL:
            assert seen["rounds"] == seen["buffers"] == first.received_bytes == 0
        else:
            assert seen["rounds"] > 3
            assert (seen["links"]["across_nodes"] > 0) == (machines > 1)


def stream_whole_tensors(rank: int) -> tuple[SyncReport, int]:
    """Push to a sink that supports no slices; return the report and the bytes of the shards of this rank."""
    sink = MemorySink(engine(TP2PP2[1], WORLD), rank)
    sink.supports_slices, sink.streaming_reason = False, "this test"
    source, _, sync = open_sync(rank, sink)
    source.set_version(1)
    report = sync.push(1, verify=True)
    return report, sum(held.view.nbytes for held in source.shards())


def test_a_streamed_sync_receives_what_the_rank_does_not_hold(rank_pool: RankPool) -> None:
    whole = sum(values(name, 1).nbytes for name in TENSORS)
    for report, own_bytes in rank_pool.call(WORLD, stream_whole_tensors):
        assert report.written_bytes == whole
        assert 0 < report.received_bytes == whole - own_bytes


def run_syncs_counting_reads(rank: int, allowed: bool) -> tuple[list[str], int]:
    """Return wrong slices and the number of reads of other ranks' memory. Unless `allowed`, rank 2 cannot read."""
    forbidden = rank == 2 and not allowed
    real, count = process_vm_readv.read_ranges, 0

    def read_runs(process: int, pairs: Sequence[tuple[StridedRange, StridedRange]]) -> None:
        nonlocal count
        if forbidden:
            raise PermissionError("forbidden by this test")
        count += len(pairs)
        real(process, pairs)

    with mock.patch.object(process_vm_readv, "read_ranges", read_runs):
        seen = run_syncs(rank, TP2PP2, "shared_memory", 1)
    return seen["wrong"], count


@pytest.mark.parametrize("allowed", [True, False])
def test_ranks_read_each_others_memory_where_allowed_and_all_receive_the_same_bytes(
    rank_pool: RankPool, allowed: bool
) -> None:
    wrong, counts = zip(*rank_pool.call(WORLD, run_syncs_counting_reads, allowed), strict=True)
    assert list(wrong) == [[]] * WORLD
    probes = WORLD - 1
    assert all(count > probes + 20 for rank, count in enumerate(counts) if allowed or rank != 2), counts
    assert allowed or counts[2] == 0


def test_gloo_receives_large_pieces_in_the_engines_memory(rank_pool: RankPool) -> None:
    for seen in rank_pool.call(WORLD, run_syncs, TP2PP2, "gloo", 1, 1 << 22):
        assert seen["wrong"] == []
        assert seen["in_place"] > 0


# Faults, each on one rank.


def flip_bit(sink: MemorySink) -> None:
    """Flip one bit of the engine's weights after the update."""
    sink.part(TensorSlice("3.down", (7, 300), (1, 1))).view(torch.int16)[0, 0] ^= 1


class FaultySink(MemorySink):
    """A sink with one fault, named by `fault`."""

    fault = ""

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        if self.fault == "stale" and hf.name == "0.norm":
            return
        if self.fault == "swapped" and hf.name in ("2.k", "2.v"):
            hf = TensorSlice({"2.k": "2.v", "2.v": "2.k"}[hf.name], hf.offsets, hf.shape)
        if self.fault == "rejected" and hf.name == "5.up":
            raise RuntimeError("no space left in the engine")
        super().write(hf, values)

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        return None if self.fault in ("stale", "swapped", "rejected") else super().memory_of(hf)

    def begin_update(self) -> None:
        if self.fault == "exited":
            raise RuntimeError("its process has exited")

    def digests(self, slices: Sequence[TensorSlice]) -> list[int]:
        if self.fault == "failing":
            raise RuntimeError("its process exited")
        return super().digests(slices)

    def end_update(self, policy_version: int) -> None:
        before = self.packed
        super().end_update(policy_version + (self.fault == "version"))
        if self.fault == "flipped":
            flip_bit(self)
        if self.fault == "packed":
            self.packed = before


def lose_bucket(transport: SharedMemoryTransport, number: int) -> Any:
    """Return a context in which the receiver reads the previous content of the buffer."""
    real = transport.incoming

    def incoming(round_: Round, message: BucketMessage) -> Tensor:
        if round_.number == number:
            stale: Tensor = real(round_, message).clone()
            stale[16:24] = torch.tensor([number - 2], dtype=torch.int64).view(torch.uint8)
            return stale
        return real(round_, message)

    return mock.patch.object(transport, "incoming", incoming)


def send_wrongly(executor: ScheduleExecutor, fault: str) -> Any:
    """In round 3 the sender keeps the previous buffer ("twice"), or packs the previous version ("older")."""
    real = executor._send

    def send(kind: str, buffer: Tensor, round_: Round, by_tensor: Any, version: int) -> None:
        if round_.number == 3 and fault == "twice":
            executor._transports[kind].start(round_)
        else:
            real(kind, buffer, round_, by_tensor, version - (round_.number == 3 and fault == "older"))

    return mock.patch.object(executor, "_send", send)


def inject_fault(sync: WeightSync, fault: str) -> Any:
    """Return a context that injects a fault of the transport on this rank."""
    if fault == "lost":
        return lose_bucket(sync.executor._transports["shared_memory"], 2)  # type: ignore[arg-type]
    return send_wrongly(sync.executor, fault) if fault in ("twice", "older") else nullcontext()


def collect_fault_errors(rank: int, faults: list[str]) -> dict[str, str | None]:
    """Return the error of a push on this rank for each fault on rank 1; None for pushes without a fault."""
    sink = FaultySink(engine(TP2PP2[1], WORLD), rank)
    source, _, sync = open_sync(rank, sink)
    errors: dict[str, str | None] = {}
    for version, fault in enumerate(["", *faults, ""], 1):
        sink.fault = fault if rank == 1 else ""
        source.set_version(version)
        with inject_fault(sync, fault if rank == 1 else ""):
            try:
                sync.push(version, verify=True)
                errors[f"{fault or 'none'} {version}"] = None
            except WeightMismatchError as error:
                errors[fault] = str(error)
    return errors


FAULTS = {
    "flipped": ["3.down[", "on rank 1: the engine's bytes differ from those of the policy's rank"],
    "stale": ["0.norm[0:192] on rank 1: the engine's bytes differ"],
    "swapped": ["2.k[", "2.v[", "on rank 1"],
    "packed": ["head[500:1000, 0:192] on rank 1", "the kernel computes with other weights"],
    "version": ["the engine of rank 1 reports version", "the policy sent version"],
    "rejected": ["5.up[", "on rank 1: the engine rejected it (no space left in the engine)"],
    "lost": ["bucket 2 from rank", "to rank 1 was expected", "bucket 0 of version"],
    "twice": ["bucket 3 from rank 1 to rank 3 was expected", "bucket 1 of version 9,"],
    "older": ["bucket 3 from rank 1 to rank 3 was expected", "bucket 3 of version 9,"],
    "exited": ["the engine of rank 1 failed: its process has exited"],
    "failing": ["the engine of rank 1 failed in the verification: its process exited"],
}


@pytest.fixture(scope="module")
def fault_errors(rank_pool: RankPool) -> list[dict[str, str | None]]:
    answers: list[dict[str, str | None]] = rank_pool.call(WORLD, collect_fault_errors, list(FAULTS))
    return answers


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_rank_is_named_on_all_with_tensor_rank_and_slice(
    fault_errors: list[dict[str, str | None]], fault: str
) -> None:
    (message,) = {answers[fault] for answers in fault_errors}
    assert message is not None
    for words in FAULTS[fault]:
        assert words in message
    others = [f"rank {rank}: the engine" for rank in (0, 2, 3)]
    assert not any(words in message for words in others), f"names more than the fault: {message}"


def test_pushes_without_a_fault_pass_before_and_after_one(fault_errors: list[dict[str, str | None]]) -> None:
    for answers in fault_errors:
        assert answers["none 1"] is None
        assert answers[f"none {len(FAULTS) + 2}"] is None


def error_of_stalled_rank(rank: int) -> str:
    """Rank 2 does not take part in the second push."""
    source, _, sync = open_sync(rank)
    source.set_version(1)
    sync.push(1, verify=True)
    sync.executor._transports["shared_memory"]._timeout = 3.0  # type: ignore[attr-defined]
    sync._barrier._timeout = 3.0
    if rank == 2:
        time.sleep(8.0)
        return ""
    try:
        sync.push(2, verify=True)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def test_a_rank_that_stalls_is_named_by_those_that_wait_for_it(rank_pool: RankPool) -> None:
    answers = rank_pool.call(WORLD, error_of_stalled_rank)
    waiting = [answers[rank] for rank in (0, 1, 3)]
    assert any("rank 2" in answer and "did not arrive within 3 s" in answer for answer in waiting), waiting
    assert all("nothing was raised" not in answer for answer in waiting)


def error_of_missing_rank(rank: int) -> str:
    """Rank 2 does not reach the barrier in time."""
    _, _, earlier = open_sync(rank)  # of engines that were rebuilt
    earlier._barrier.gather(None, "testing")
    _, _, sync = open_sync(rank)
    sync._barrier._timeout = 2.0
    if rank == 2:
        time.sleep(5.0)
        return ""
    try:
        sync._barrier.gather(None, "testing")
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def test_a_barrier_names_the_missing_ranks_and_where_they_are(rank_pool: RankPool) -> None:
    answers = rank_pool.call(WORLD, error_of_missing_rank)
    for rank in (0, 1, 3):
        assert f"testing: rank {rank} (place {rank}) timed out after 2 s waiting for rank 2 (place 2)" in answers[rank]


def error_of_withheld_bucket(rank: int) -> tuple[str, int]:
    """Rank 1 takes part, but never sends its bucket 3."""
    source, sink, sync = open_sync(rank)
    source.set_version(1)
    sync.push(1, verify=True)
    transport = sync.executor._transports["shared_memory"]
    transport._timeout = sync._barrier._timeout = 3.0  # type: ignore[attr-defined]
    start = transport.start
    withheld = mock.patch.object(transport, "start", lambda round_: None if round_.number >= 3 else start(round_))
    try:
        with withheld if rank == 1 else nullcontext():
            sync.push(2, verify=True)
    except RuntimeError as error:
        return str(error), sink.policy_version
    return "nothing was raised", sink.policy_version


def test_a_missing_bucket_is_named_with_both_ranks_and_its_receiver_keeps_the_previous_version(
    rank_pool: RankPool,
) -> None:
    answers = rank_pool.call(WORLD, error_of_withheld_bucket)
    assert all("nothing was raised" not in message for message, _ in answers)
    message, version = answers[3]
    assert "bucket 3" in message
    assert "rank 1 to rank 3" in message
    assert version == 1


def kill_one_rank(rank: int) -> None:
    source, _, sync = open_sync(rank, seconds=60.0)
    source.set_version(1)
    sync.push(1, verify=True)
    if rank == 2:
        os._exit(3)
    sync.push(2, verify=True)


def test_a_rank_that_exits_ends_the_others_at_once_with_its_name(rank_pool: RankPool) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        rank_pool.call(WORLD, kill_one_rank)
    assert "ended with exit code 3" in str(caught.value)
    assert "from rank 2" in str(caught.value)
    assert "the process of rank 2 exited" in str(caught.value)
    assert time.monotonic() - start < 50


class SinkWithoutSlices(MemorySink):
    supports_slices = False
    streaming_reason = "its loader computes"

    def layout(self) -> list[Any]:
        return []


def run_streaming(rank: int) -> tuple[list[str], int]:
    sink = SinkWithoutSlices(engine(EngineLayout(2), WORLD), rank)
    with mock.patch("grpo_mega.weight_sync.sync.log") as log:
        source, _, sync = open_sync(rank, sink)
        source.set_version(1)
        sync.push(1, verify=True)
        sync.push(2, verify=True)
    wrong = [str(hf) for hf, memory in sink.memory.items() if not torch.equal(memory, values(hf.name, 1)[hf.index])]
    return wrong, log.warning.call_count


def test_an_engine_without_slices_receives_whole_tensors_with_one_warning(rank_pool: RankPool) -> None:
    assert rank_pool.call(WORLD, run_streaming) == [([], 1)] * WORLD


def error_of_mismatched_layouts(rank: int, change: str) -> str:
    wanted = engine(EngineLayout(2), WORLD)
    numbers = {name: i for i, name in enumerate(TENSORS)}
    if change == "missing" and rank == 1:
        wanted = wanted.select(wanted.tensors != numbers["4.up"])
    sink = MemorySink(wanted, rank)
    if change == "unknown" and rank == 1:
        sink.memory[TensorSlice("rotary", (0,), (8,))] = torch.zeros(8)
    try:
        open_sync(rank, sink)
    except WeightMismatchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "the engine of ranks 0 to 1 does not store all elements of 4.up (55296 of 110592 elements)"),
        ("unknown", "rotary[0:8] on rank 1: the policy does not have this tensor"),
    ],
)
def test_tensors_that_do_not_match_are_named_on_every_rank(rank_pool: RankPool, change: str, words: str) -> None:
    for message in rank_pool.call(WORLD, error_of_mismatched_layouts, change):
        assert words in message


def test_ranks_with_different_plans_or_versions_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"rank 0 .*plan a.*rank 2 .*plan b"):
        check_same_plan(["a", "a", "b"])
    with pytest.raises(WeightMismatchError, match=r"rank 1 .*version 3.*version 4"):
        check_versions([4, 3], 4)


class LateSlots:
    """Stub of GPU buffers: other ranks see a copy only after `synchronize`."""

    def __init__(self, num_bytes: int, _device: torch.device) -> None:
        self.own = torch.zeros(num_bytes, dtype=torch.uint8)
        path = Path("/dev/shm", f"grpo_mega_late_{os.getpid()}")
        self.handle = (str(path), num_bytes)
        self._seen = self.map(self.handle, 0)

    def map(self, handle: tuple[str, int], _rank: int) -> Tensor:
        return torch.from_file(handle[0], shared=True, size=handle[1], dtype=torch.uint8)

    def synchronize(self) -> None:
        self._seen.copy_(self.own)


def exchange_by_device(rank: int) -> list[str]:
    with mock.patch.object(factory, "DeviceSlots", LateSlots):
        wrong = exchange_on_two_ranks(rank, "cuda_ipc")
    Path("/dev/shm", f"grpo_mega_late_{os.getpid()}").unlink()
    return wrong


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_every_byte_of_every_round_arrives(rank_pool: RankPool, kind: str) -> None:
    assert rank_pool.call(2, exchange_on_two_ranks, kind) == [[], []]


def test_device_buffers_are_read_after_they_are_filled(rank_pool: RankPool) -> None:
    """The stub shows a copy as late as a GPU may; the test on a GPU is in tests/gpu."""
    assert rank_pool.call(2, exchange_by_device) == [[], []]


def test_an_unavailable_transport_is_rejected() -> None:
    for kind in ("nccl", "cuda_ipc"):
        with pytest.raises(ValueError, match=rf"weight_sync\.transport={kind} needs CUDA"):
            factory.transport_kinds(kind)  # type: ignore[arg-type]
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        pytest.raises(ValueError, match=r"weight_sync\.transport=gloo moves host memory"),
    ):
        factory.transport_kinds("gloo")

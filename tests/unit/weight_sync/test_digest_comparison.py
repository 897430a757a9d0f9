"""Digests alone show which tensors differ between policy and engine; two thousand faults are all found."""

from __future__ import annotations

import random

import pytest
import torch

from grpo_mega.models.digest import slice_digest, wrap_int64
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import TensorSlice
from grpo_mega.weight_sync.digest_comparison import PieceDigests, differing_tensors, localize_mismatches, piece_digests
from grpo_mega.weight_sync.plan import ReshardPlan, plan_reshard
from tests.helpers.memory_ends import MemorySink, MemorySource, dtype_of, values
from tests.helpers.weight_layouts import TENSORS, EngineLayout, engine, policy

TOP, BOTTOM = TensorSlice("w", (0, 0), (2, 4)), TensorSlice("w", (2, 0), (2, 4))
NORM = TensorSlice("norm", (0,), (4,))
EXPECTED = {"w": 30, "norm": 5}


def test_slices_over_the_ranks_and_replicated_copies_that_agree_are_equal() -> None:
    assert differing_tensors(EXPECTED, [{TOP: 10, NORM: 5}, {BOTTOM: 20, NORM: 5}]) == []


def test_several_slices_of_a_tensor_on_one_rank_add_up() -> None:
    assert differing_tensors(EXPECTED, [{TOP: 10, BOTTOM: 20, NORM: 5}]) == []


def test_a_slice_that_no_rank_holds_is_found() -> None:
    assert differing_tensors(EXPECTED, [{TOP: 10, NORM: 5}, {NORM: 5}]) == ["w"]


def test_a_wrong_slice_is_found() -> None:
    assert differing_tensors(EXPECTED, [{TOP: 10, NORM: 5}, {BOTTOM: 21, NORM: 5}]) == ["w"]


@pytest.mark.parametrize(
    "held", [[{TOP: 10, BOTTOM: 20, NORM: 5}, {NORM: 6}], [{TOP: 10, BOTTOM: 20, NORM: 6}, {NORM: 5}]]
)
def test_copies_that_differ_are_found_whichever_rank_is_right(held: list[dict[TensorSlice, int]]) -> None:
    assert differing_tensors(EXPECTED, held) == ["norm"]


def test_a_copy_on_a_second_rank_counts_once() -> None:
    assert differing_tensors({"norm": 10}, [{NORM: 5}, {NORM: 5}]) == ["norm"]


def test_sums_wrap_as_digests_do() -> None:
    large = (1 << 63) - 1
    assert differing_tensors({"w": wrap_int64(2 * large)}, [{TOP: large}, {BOTTOM: large}]) == []


def test_all_differing_tensors_are_listed_in_order() -> None:
    assert differing_tensors(EXPECTED, [{TOP: 11, BOTTOM: 20, NORM: 4}]) == ["norm", "w"]


WORLD = 4


class Job:
    """Four ranks in one process: a policy of TP2 x PP2 and two engines of two ranks, all at version 1."""

    def __init__(self) -> None:
        held, wanted = policy(Topology(WORLD, tp=2, pp=2)), engine(EngineLayout(2), WORLD)
        self.plan: ReshardPlan = plan_reshard(TENSORS, held, wanted, (0,) * WORLD, 1 << 20)
        self.sources = [MemorySource(held, rank) for rank in range(WORLD)]
        self.sinks = [MemorySink(wanted, rank) for rank in range(WORLD)]
        for source, sink in zip(self.sources, self.sinks, strict=True):
            source.set_version(1)
            for hf, memory in sink.memory.items():
                memory.copy_(values(hf.name, 1)[hf.index])
        self.digests = [dict(zip(sink.memory, sink.digests(list(sink.memory)), strict=True)) for sink in self.sinks]
        self.expected = dict.fromkeys(TENSORS, 0)
        for source in self.sources:
            for shard in source.shards():
                if shard.counted:
                    name = shard.hf.name
                    self.expected[name] = wrap_int64(self.expected[name] + slice_digest(shard.view, shard.hf))

    def found(self, rank: int, *slices: TensorSlice) -> list[str]:
        """Return the mismatches when only these slices of this rank may have changed."""
        replica = [dict(self.digests[r]) for r in ((0, 1), (2, 3))[rank // 2]]
        for hf in slices:
            (replica[rank % 2][hf],) = self.sinks[rank].digests([hf])
        suspects = set(differing_tensors(self.expected, replica))
        if not suspects:
            return []
        dtypes = {name: dtype_of(name) for name in TENSORS}
        everywhere: list[PieceDigests] = [
            piece_digests(self.plan, r, suspects, self.sources[r].shards(), self.sinks[r], dtypes) for r in range(WORLD)
        ]
        return localize_mismatches(self.plan, suspects, everywhere)


def test_every_one_of_a_thousand_flipped_bits_is_found_and_named() -> None:
    job, choose = Job(), random.Random(0)
    for _ in range(1000):
        rank = choose.randrange(WORLD)
        hf = choose.choice(list(job.sinks[rank].memory))
        memory = job.sinks[rank].memory[hf].view(-1)
        words = memory.view({2: torch.int16, 4: torch.int32}[memory.element_size()])
        place, bit = choose.randrange(len(words)), choose.randrange(8 * memory.element_size() - 1)
        words[place] ^= 1 << bit
        (fault,) = job.found(rank, hf)
        assert fault.startswith(f"{hf.name}[")
        assert f"on rank {rank}: the engine's bytes differ" in fault
        words[place] ^= 1 << bit
        assert job.found(rank, hf) == []


def assert_named(faults: list[str], rank: int, slices: set[TensorSlice]) -> None:
    assert {fault.partition("[")[0] for fault in faults} == {hf.name for hf in slices}
    assert all(f"on rank {rank}: the engine's bytes differ" in fault for fault in faults)


def test_every_one_of_a_thousand_swapped_slices_and_stale_tensors_is_found_and_named() -> None:
    job, choose = Job(), random.Random(1)
    for i in range(1000):
        rank = choose.randrange(WORLD)
        hf = choose.choice(list(job.sinks[rank].memory))
        memory = job.sinks[rank].memory[hf]
        right = memory.clone()
        if i % 2:
            memory.copy_(values(hf.name, 0)[hf.index])  # the previous version
        else:
            flat, size = memory.view(-1), choose.randrange(1, memory.numel() // 2)
            first = choose.randrange(memory.numel() - 2 * size + 1)
            second = choose.randrange(first + size, memory.numel() - size + 1)
            one = flat[first : first + size].clone()
            flat[first : first + size] = flat[second : second + size]
            flat[second : second + size] = one
        assert not torch.equal(memory, right)
        assert_named(job.found(rank, hf), rank, {hf})
        memory.copy_(right)
        assert job.found(rank, hf) == []


def test_a_missing_bucket_is_named_by_every_tensor_in_it() -> None:
    held, wanted = policy(Topology(WORLD, tp=2, pp=2)), engine(EngineLayout(2), WORLD)
    job = Job()
    job.plan = plan_reshard(TENSORS, held, wanted, (0,) * WORLD, 1 << 16)
    missing = sorted({(int(b), int(d)) for b, d in zip(job.plan.bucket, job.plan.dst, strict=True) if b >= 0})
    assert len(missing) > 100
    for bucket, rank in missing[::8]:
        sink, changed = job.sinks[rank], set()
        for transfer in ((job.plan.bucket == bucket) & (job.plan.dst == rank)).nonzero()[0]:
            group = int(job.plan.group[transfer])
            for piece in range(int(job.plan.group_starts[group]), int(job.plan.group_starts[group + 1])):
                hf = job.plan.slice_of(piece)
                sink.write(hf, values(hf.name, 0)[hf.index])
                changed |= {own for own in sink.memory if own.name == hf.name}
        assert_named(job.found(rank, *changed), rank, changed)
        for own in changed:
            sink.memory[own].copy_(values(own.name, 1)[own.index])


def test_copies_of_the_policy_that_differ_are_named_with_both_ranks() -> None:
    held, wanted = policy(Topology(2)), engine(EngineLayout(1), 2, first_rank=2)
    plan = plan_reshard(TENSORS, held, wanted, (0,) * 4, 1 << 20)
    group = next(int(p) for p in plan.group if len(set(plan.src[plan.group == p].tolist())) == 2)
    piece = int(plan.group_starts[group])
    everywhere = [PieceDigests(dict.fromkeys(range(len(plan.pieces)), rank), {}) for rank in range(2)]
    everywhere += [PieceDigests({}, dict.fromkeys(range(len(plan.pieces)), 0)) for _ in range(2)]
    name = plan.slice_of(piece).name
    assert any(
        "rank 0 and rank 1 of the policy hold different copies" in f
        for f in localize_mismatches(plan, {name}, everywhere)
    )

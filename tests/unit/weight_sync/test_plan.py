"""The reshard plan over many pairs of layouts: received slices, bytes per link, and rejected input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_mega.parallel.topology import Topology
from grpo_mega.types import TensorSlice, WeightMismatchError
from grpo_mega.weight_sync.plan import ReshardPlan, plan_reshard
from grpo_mega.weight_sync.slice_table import RankSliceTable, SentTensor, concatenate, split_slice, table_of_rank
from grpo_mega.weight_sync.traffic import LOCAL
from tests.helpers.weight_layouts import TENSORS, EngineLayout, engine, policy

BUCKET_BYTES = 256 * 1024
NODE = 4  # ranks
TABLE = Path(__file__).resolve().parents[3] / "docs" / "measurements" / "weight_sync.md"

# (ranks, policy's tp pp cp ep etp, engine)
PAIRS: list[tuple[int, dict[str, int], EngineLayout]] = [
    (1, {}, EngineLayout(1)),
    (2, {"tp": 2}, EngineLayout(2)),
    (2, {"tp": 2}, EngineLayout(1)),
    (2, {"pp": 2}, EngineLayout(2)),
    (2, {}, EngineLayout(2)),
    (4, {"tp": 2, "pp": 2}, EngineLayout(2)),
    (4, {"tp": 2, "pp": 2}, EngineLayout(4)),
    (4, {"tp": 2, "pp": 2}, EngineLayout(1)),
    (4, {"pp": 4}, EngineLayout(4)),
    (4, {"cp": 2, "tp": 2}, EngineLayout(4)),
    (4, {"ep": 4}, EngineLayout(4, ep=True)),
    (4, {"tp": 2, "ep": 2}, EngineLayout(2, 2, ep=True)),
    (4, {"tp": 2, "ep": 2, "etp": 2}, EngineLayout(4, ep=True)),
    (6, {"tp": 3}, EngineLayout(2)),
    (6, {"tp": 3, "pp": 2}, EngineLayout(2)),
    (6, {"tp": 2, "pp": 3}, EngineLayout(3)),
    (6, {"tp": 6}, EngineLayout(3, 2, ep=True)),
    (6, {"pp": 2, "ep": 3}, EngineLayout(6)),
    (6, {"pp": 3, "ep": 2}, EngineLayout(2, 3, ep=True)),
    (8, {"tp": 2, "pp": 2, "ep": 4}, EngineLayout(4)),
    (8, {"tp": 2, "pp": 2, "ep": 4}, EngineLayout(2, 2, ep=True)),
    (8, {"pp": 4, "ep": 2}, EngineLayout(8)),
    (8, {"tp": 2, "cp": 2, "ep": 4}, EngineLayout(4)),
    (12, {"tp": 3, "pp": 2, "ep": 6}, EngineLayout(4)),
    (12, {"tp": 6, "pp": 2, "ep": 3, "etp": 2}, EngineLayout(12)),
    (24, {"tp": 2, "pp": 3, "ep": 4}, EngineLayout(4, 3, ep=True)),
]


def name_of(pair: Any) -> str:
    ranks, axes, layout = pair
    return f"{ranks}-{''.join(f'{k}{v}' for k, v in axes.items()) or 'dp'}-to-{layout}"


def elements(table: RankSliceTable, rank: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return the number of times that `rank` lists each element of each tensor."""
    counts = {name: np.zeros(tensor.shape, np.int64) for name, tensor in TENSORS.items()}
    mine = table.rows_on([rank])
    for i in range(len(mine)):
        array = counts[list(TENSORS)[mine.tensors[i]]]
        array[tuple(slice(*ends) for ends in zip(mine.starts[i], mine.ends[i], strict=True))[: array.ndim]] += 1
    return counts


def num_bytes(counts: dict[str, np.ndarray[Any, Any]]) -> int:
    return sum(int(array.sum()) * TENSORS[name].itemsize for name, array in counts.items())


def row_of(case: Case) -> str:
    """Return the case's line of docs/measurements/weight_sync.md."""
    plan, traffic = case.plan, case.plan.traffic
    received = traffic.received_bytes()
    axes = " ".join(f"{axis.upper()}{size}" for axis, size in case.axes.items()) or "DP"
    return (
        f"| {case.world} | {axes} | {case.layout} | {received.min():,} - {received.max():,} | "
        f"{traffic.bytes_by_link()['across_nodes']:,} | {traffic.busiest_link_ratio():.4f} | {plan.num_buckets} |"
    )


class Case:
    """A pair of layouts and the plan between them."""

    def __init__(self, pair: tuple[int, dict[str, int], EngineLayout]) -> None:
        self.world, self.axes, self.layout = pair
        self.held, self.wanted = policy(Topology(self.world, **self.axes)), engine(self.layout, self.world)
        self.nodes = tuple(rank // NODE for rank in range(self.world))
        self.plan = plan_reshard(TENSORS, self.held, self.wanted, self.nodes, BUCKET_BYTES)
        self.has = [elements(self.held, rank) for rank in range(self.world)]
        self.stores = [elements(self.wanted, rank) for rank in range(self.world)]


@pytest.fixture(scope="module", params=PAIRS, ids=[name_of(pair) for pair in PAIRS])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_each_rank_receives_every_element_that_it_stores_once_from_a_rank_that_holds_it(case: Case) -> None:
    arrived = [{name: np.zeros(t.shape, np.int64) for name, t in TENSORS.items()} for _ in range(case.world)]
    for rank in range(case.world):
        for _, piece, src, dst in case.plan.of_rank(rank):
            if dst == rank:
                arrived[rank][piece.name][piece.index] += 1
                assert case.has[src][piece.name][piece.index].all(), f"{piece}: rank {src} does not hold all of it"
    for rank in range(case.world):
        for name in TENSORS:
            assert (arrived[rank][name] == case.stores[rank][name]).all(), (rank, name)


def test_a_rank_receives_exactly_the_bytes_that_it_stores_and_does_not_hold(case: Case) -> None:
    for rank in range(case.world):
        stored, held = case.stores[rank], case.has[rank]
        missing = {name: stored[name] * (held[name] == 0) for name in TENSORS}
        assert case.plan.traffic.received_bytes()[rank] == num_bytes(missing)
        for bucket, piece, src, dst in case.plan.of_rank(rank):
            assert (bucket == LOCAL) == (src == dst)
            if dst == rank and src != rank:
                assert not held[piece.name][piece.index].any()


def test_a_slice_crosses_nodes_only_when_no_rank_of_the_node_has_it(case: Case) -> None:
    for rank in range(case.world):
        for _, piece, src, dst in case.plan.of_rank(rank):
            if dst == rank and case.nodes[src] != case.nodes[dst]:
                near = [r for r in range(case.world) if case.nodes[r] == case.nodes[dst]]
                assert not any(case.has[r][piece.name][piece.index].all() for r in near)


def test_the_busiest_link_carries_at_most_1_05_times_the_lower_bound(case: Case) -> None:
    assert case.plan.traffic.busiest_link_ratio() <= 1.05
    busiest = case.plan.traffic.busiest()
    assert all(busiest[link] >= bound for link, bound in case.plan.bounds.items()), "not a lower bound"


def test_the_committed_table_has_the_numbers_of_the_plan(case: Case) -> None:
    assert row_of(case) in TABLE.read_text().splitlines()


def test_each_round_fits_a_bucket_on_every_rank_and_rounds_are_few(case: Case) -> None:
    plan = case.plan
    fill = np.zeros((plan.num_buckets + 1, case.world), np.int64)
    for bucket, src, dst, size in zip(plan.bucket, plan.src, plan.dst, plan.transfer_bytes, strict=True):
        if bucket != LOCAL:
            fill[bucket, [src, dst]] += size
    assert fill.max(initial=0) <= BUCKET_BYTES
    assert plan.traffic.peak_buffer_bytes() == int((fill[1:] + fill[:-1]).max(initial=0)) <= 2 * BUCKET_BYTES
    assert plan.num_buckets <= 1 + 1.35 * fill.sum(0).max() / BUCKET_BYTES


def test_the_plan_does_not_depend_on_the_order_of_the_ranks_reports(case: Case) -> None:
    shuffled = []
    for table in (case.held, case.wanted):
        ranks = np.random.default_rng(0).permutation(case.world).tolist()
        shuffled.append(concatenate([table.rows_on([rank]).placed_on([rank]) for rank in ranks]))
    again = plan_reshard(TENSORS, shuffled[0], shuffled[1], case.nodes, BUCKET_BYTES)
    assert again.hash == case.plan.hash


def small_plan(**changes: Any) -> ReshardPlan:
    held = policy(Topology(2, tp=2))
    arguments = {"held": held, "wanted": engine(EngineLayout(2), 2), "nodes": (0, 0), "bucket_bytes": BUCKET_BYTES}
    return plan_reshard(TENSORS, **(arguments | changes))


def test_equal_layouts_send_nothing() -> None:
    plan = small_plan()
    assert plan.traffic.bytes_by_link()["same_node"] == plan.traffic.bytes_by_link()["across_nodes"] == 0
    assert plan.num_buckets == plan.traffic.peak_buffer_bytes() == 0
    assert plan.traffic.busiest_link_ratio() == 1.0


def test_hash_changes_with_bucket_bytes_nodes_layout_and_dtype() -> None:
    others = [
        small_plan(bucket_bytes=2 * BUCKET_BYTES),
        small_plan(nodes=(0, 1)),
        small_plan(wanted=engine(EngineLayout(1), 2)),
    ]
    assert len({small_plan().hash, *(plan.hash for plan in others)}) == 4
    wider = {name: replace(tensor, itemsize=4) for name, tensor in TENSORS.items()}
    assert plan_reshard(wider, policy(Topology(1)), engine(EngineLayout(1), 1), (0,), BUCKET_BYTES).hash != (
        plan_reshard(TENSORS, policy(Topology(1)), engine(EngineLayout(1), 1), (0,), BUCKET_BYTES).hash
    )


def test_an_engine_on_other_ranks_receives_all_slices_that_it_stores() -> None:
    wanted = engine(EngineLayout(2), 2, first_rank=2)
    plan = small_plan(wanted=wanted, nodes=(0, 0, 1, 1))
    stored = [num_bytes(elements(wanted, rank)) for rank in range(4)]
    assert plan.traffic.received_bytes().tolist() == stored
    assert plan.traffic.bytes_by_link()["same_process"] == plan.traffic.bytes_by_link()["same_node"] == 0


W = {"w": SentTensor((8, 4), 2)}


def rows_of(rank: int, *rows: tuple[int, int]) -> RankSliceTable:
    return table_of_rank(W, [TensorSlice("w", (a, 0), (b - a, 4)) for a, b in rows], rank)


def test_an_element_that_no_rank_holds_is_named_with_the_rank_that_needs_it() -> None:
    with pytest.raises(WeightMismatchError, match=r"w\[2:8, 0:4\], needed by rank 3 .*hold 20 of its 24 elements"):
        plan_reshard(W, concatenate([rows_of(0, (0, 4)), rows_of(1, (5, 8))]), rows_of(3, (2, 8)), (0,) * 4, 1024)


def test_overlapping_shards_that_differ_are_named_with_their_ranks() -> None:
    with pytest.raises(WeightMismatchError, match=r"rank 0 and rank 1 .* w\[3:4, 0:4\]"):
        plan_reshard(W, concatenate([rows_of(0, (0, 4)), rows_of(1, (3, 8))]), rows_of(0, (0, 8)), (0, 0), 1024)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (TensorSlice("x", (0,), (1,)), r"x\[0:1\] on rank 5: the policy does not have this tensor"),
        (TensorSlice("w", (7, 0), (2, 4)), r"w\[7:9, 0:4\] on rank 5 exceeds the tensor's shape \[8, 4\]"),
        (TensorSlice("w", (7,), (1,)), r"w\[7:8\] on rank 5 exceeds"),
    ],
)
def test_a_slice_that_the_policy_does_not_have_is_named(hf: TensorSlice, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_of_rank(W, [hf], 5)


def test_a_slice_that_a_rank_lists_twice_is_sent_once() -> None:
    plan = plan_reshard(W, rows_of(0, (0, 8)), concatenate([rows_of(1, (0, 8)), rows_of(1, (0, 8))]), (0, 0), 1024)
    assert plan.traffic.received_bytes().tolist() == [0, 64]


def test_a_bucket_smaller_than_eight_elements_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"weight_sync\.bucket_bytes=15"):
        plan_reshard(W, rows_of(0, (0, 8)), rows_of(1, (0, 8)), (0, 0), 15)


def test_split_slice_yields_disjoint_parts_within_the_limit_that_fill_the_slice() -> None:
    seen = np.zeros((3, 5, 7), np.int64)
    for start, end in split_slice((0, 1, 0), (3, 5, 7), 10):
        part = tuple(slice(s, e) for s, e in zip(start, end, strict=True))
        assert 0 < seen[part].size <= 10
        seen[part] += 1
    assert (seen[:, 1:] == 1).all()
    assert (seen[:, 0] == 0).all()

"""The rank grid: values worked by hand, and a comparison with Megatron's own RankGenerator."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.parallel.topology import Coordinates, Topology
from grpo_mega.types import UserError
from tests.conftest import REPOSITORY
from tests.helpers.error_messages import assert_names


def test_grid_of_tp2_dp2_pp2_with_replicas_of_two_ranks_by_hand() -> None:
    grid = Topology(8, tp=2, pp=2, engine_tp=2, ep=2)
    assert (grid.dp, grid.edp, grid.num_replicas, grid.num_prompt_shards) == (2, 2, 4, 4)
    #             rank tp cp dp pp etp ep edp replica engine_tp engine_dp shard
    assert [grid.coordinates(rank) for rank in range(8)] == [
        Coordinates(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        Coordinates(1, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0),
        Coordinates(2, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1),
        Coordinates(3, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1),
        Coordinates(4, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 2),
        Coordinates(5, 1, 0, 0, 1, 0, 1, 0, 2, 1, 0, 2),
        Coordinates(6, 0, 0, 1, 1, 0, 0, 1, 3, 0, 0, 3),
        Coordinates(7, 1, 0, 1, 1, 0, 1, 1, 3, 1, 0, 3),
    ]
    assert [grid.replica_ranks(replica) for replica in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [grid.loss_rank(dp_rank) for dp_rank in range(2)] == [4, 6]
    assert grid.describe(5) == "rank 5 | dp 0/2 pp 1/2 tp 1/2 ep 1/2"
    assert Topology(8, tp=2, pp=2).describe(5) == "rank 5 | dp 0/2 pp 1/2 tp 1/2"
    assert Topology(8, tp=2, cp=2).describe(5) == "rank 5 | dp 1/2 pp 0/1 tp 1/2 cp 0/2"


def test_replicas_of_tp2_dp2_have_two_prompt_shards_each() -> None:
    grid = Topology(8, engine_tp=2, engine_dp=2)
    assert (grid.engine_ranks, grid.num_replicas, grid.num_prompt_shards) == (4, 2, 4)
    assert [grid.replica_ranks(replica) for replica in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [grid.prompt_shard_ranks(index) for index in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    at = [grid.coordinates(rank) for rank in range(8)]
    assert [c.replica for c in at] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [c.prompt_shard for c in at] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [c.engine_dp_rank for c in at] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [c.engine_tp_rank for c in at] == [0, 1] * 4


GRIDS: list[dict[str, Any]] = [
    {"world_size": 1},
    {"world_size": 12, "tp": 3, "pp": 2, "engine_tp": 4},
    {"world_size": 24, "tp": 2, "pp": 3, "engine_tp": 2, "engine_dp": 4},
    {"world_size": 16, "tp": 2, "cp": 2, "pp": 2},
    {"world_size": 16, "tp": 2, "cp": 2, "pp": 2, "ep": 4},
    {"world_size": 16, "tp": 1, "cp": 4, "pp": 2, "ep": 2, "etp": 4},
    {"world_size": 64, "tp": 8, "pp": 2, "ep": 32},
    {"world_size": 48, "tp": 4, "cp": 3, "pp": 2, "ep": 3, "etp": 2},
]


@pytest.mark.parametrize("sizes", GRIDS, ids=str)
def test_coordinates_number_every_rank_once(sizes: dict[str, Any]) -> None:
    grid = Topology(**sizes)
    at = [grid.coordinates(rank) for rank in range(grid.world_size)]
    dense = [c.tp_rank + grid.tp * (c.cp_rank + grid.cp * (c.dp_rank + grid.dp * c.pp_rank)) for c in at]
    experts = [c.etp_rank + grid.etp * (c.ep_rank + grid.ep * (c.edp_rank + grid.edp * c.pp_rank)) for c in at]
    assert dense == experts == list(range(grid.world_size))
    engines = [c.engine_tp_rank + grid.engine_tp * (c.engine_dp_rank + grid.engine_dp * c.replica) for c in at]
    assert engines == list(range(grid.world_size))
    for c in at:
        for axis in ("tp", "cp", "dp", "pp", "etp", "ep", "edp", "engine_tp", "engine_dp"):
            assert 0 <= getattr(c, axis + "_rank") < getattr(grid, axis)
    for dp_rank in range(grid.dp):
        loss = grid.coordinates(grid.loss_rank(dp_rank))
        assert (loss.tp_rank, loss.cp_rank, loss.dp_rank, loss.pp_rank) == (0, 0, dp_rank, grid.pp - 1)


@pytest.mark.parametrize("sizes", GRIDS, ids=str)
def test_groups_of_each_axis_equal_those_of_megatrons_generator(sizes: dict[str, Any]) -> None:
    from grpo_mega.policy.megatron_patches import cpu

    cpu.prepare_import()
    from megatron.core.parallel_state import RankGenerator

    grid = Topology(**sizes)
    order = "tp-cp-ep-dp-pp"  # the default of initialize_model_parallel
    dense = RankGenerator(tp=grid.tp, ep=1, dp=grid.dp, pp=grid.pp, cp=grid.cp, order=order)
    experts = RankGenerator(tp=grid.etp, ep=grid.ep, dp=grid.edp, pp=grid.pp, cp=1, order=order)
    mine = {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"}
    for axes in ("tp", "cp", "dp", "pp", "dp-cp", "tp-pp", "tp-dp-cp", "tp-cp"):
        assert groups_along(grid, axes.split("-"), ["tp", "cp", "dp", "pp"]) == sorted(dense.get_ranks(axes)), axes
    for axes in ("tp", "ep", "dp", "tp-ep", "tp-ep-pp"):
        shared = [mine[axis] for axis in axes.split("-")]
        assert groups_along(grid, shared, list(mine.values())) == sorted(experts.get_ranks(axes)), axes


def groups_along(grid: Topology, axes: list[str], all_axes: list[str]) -> list[list[int]]:
    """Return the groups of ranks that differ only in `axes`."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(grid.world_size):
        at = grid.coordinates(rank)
        rest = tuple(getattr(at, axis + "_rank") for axis in all_axes if axis not in axes)
        groups.setdefault(rest, []).append(rank)
    return sorted(groups.values())


@pytest.mark.parametrize(
    ("axes", "named"),
    [
        ({"tp": 2, "pp": 2}, ["run.world_size=6", "parallel.tp", "parallel.pp", "2 x 1 x 2", "use a multiple of 4"]),
        ({"tp": 3, "ep": 4}, ["run.world_size=6", "parallel.etp", "parallel.ep", "1 x 4 x 1", "use a multiple of 12"]),
        ({"engine_tp": 4}, ["engine.tp=4", "6 rank(s)", "use a divisor of 6"]),
        ({"engine_tp": 2, "engine_dp": 2}, ["engine.tp x engine.dp=2 x 2", "6 rank(s)", "a divisor of 6"]),
    ],
)
def test_a_layout_that_does_not_divide_the_ranks_is_rejected_with_a_remedy(
    axes: dict[str, int], named: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        Topology(6, **axes)
    assert_names(caught.value, *named)


def test_a_topology_has_every_axis_of_its_config() -> None:
    config = load_config(
        REPOSITORY / "configs" / "quickstart.yaml", ["parallel.tp=2", "parallel.pp=3", "engine.tp=4", "engine.dp=3"]
    )
    axes = config.parallel.model_copy(update={"cp": 5, "vpp": 6, "ep": 10, "etp": 1})
    grid = Topology.of(config.model_copy(update={"parallel": axes}), 60)
    assert grid == Topology(60, tp=2, pp=3, engine_tp=4, cp=5, ep=10, etp=1, vpp=6, engine_dp=3)


def test_ranks_are_divided_into_one_contiguous_block_per_server() -> None:
    grid = Topology(8, tp=2, engine_tp=4, engine_servers=2)
    assert (grid.num_replicas, grid.engine_ranks, grid.num_server_ranks) == (2, 4, 8)
    # all ranks of a server's block sample the same prompt shard
    one_each = Topology(8, tp=2, engine_tp=1, engine_servers=2)
    assert (one_each.num_prompt_shards, [one_each.coordinates(rank).prompt_shard for rank in (0, 3, 4)]) == (
        2,
        [0, 0, 1],
    )
    assert [grid.replica_ranks(i) for i in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [(at.replica, at.engine_tp_rank) for at in map(grid.coordinates, range(8))] == [
        (rank // 4, rank % 4) for rank in range(8)
    ]
    assert Topology(1, engine_tp=8, engine_servers=1).replica_ranks(0) == [0]  # a server may be larger than the job
    with pytest.raises(UserError, match=r"engine\.urls.* 3 servers.* run\.world_size=8"):
        Topology(8, engine_servers=3)

"""The rank grid, by hand."""

from __future__ import annotations

import pytest

from grpo_mega.parallel.topology import Coordinates, Topology
from grpo_mega.types import UserError


def test_grid_of_tp2_dp2_pp2_with_replicas_of_two_ranks_by_hand() -> None:
    grid = Topology(8, tp=2, pp=2, engine_tp=2)
    assert (grid.dp, grid.num_replicas) == (2, 4)
    #             rank tp dp pp replica engine_tp
    assert [grid.coordinates(rank) for rank in range(8)] == [
        Coordinates(0, 0, 0, 0, 0, 0),
        Coordinates(1, 1, 0, 0, 0, 1),
        Coordinates(2, 0, 1, 0, 1, 0),
        Coordinates(3, 1, 1, 0, 1, 1),
        Coordinates(4, 0, 0, 1, 2, 0),
        Coordinates(5, 1, 0, 1, 2, 1),
        Coordinates(6, 0, 1, 1, 3, 0),
        Coordinates(7, 1, 1, 1, 3, 1),
    ]
    assert [grid.replica_ranks(replica) for replica in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [grid.loss_rank(dp_rank) for dp_rank in range(2)] == [4, 6]
    assert grid.describe(5) == "rank 5 | dp 0/2 pp 1/2 tp 1/2"


@pytest.mark.parametrize(("world", "tp", "pp", "engine_tp"), [(1, 1, 1, 1), (12, 3, 2, 4), (24, 2, 3, 8), (6, 1, 6, 3)])
def test_coordinates_number_every_rank_once(world: int, tp: int, pp: int, engine_tp: int) -> None:
    grid = Topology(world, tp, pp, engine_tp)
    at = [grid.coordinates(rank) for rank in range(world)]
    assert [c.tp_rank + tp * (c.dp_rank + grid.dp * c.pp_rank) for c in at] == list(range(world))
    assert [c.replica * engine_tp + c.engine_tp_rank for c in at] == list(range(world))
    assert all(c.tp_rank < tp and c.dp_rank < grid.dp and c.pp_rank < pp and c.engine_tp_rank < engine_tp for c in at)
    for dp_rank in range(grid.dp):
        loss = grid.coordinates(grid.loss_rank(dp_rank))
        assert (loss.tp_rank, loss.dp_rank, loss.pp_rank) == (0, dp_rank, pp - 1)


def test_a_layout_that_does_not_divide_the_ranks_says_what_would() -> None:
    with pytest.raises(UserError) as caught:
        Topology(6, tp=2, pp=2)
    assert str(caught.value) == (
        "parallel.tp=2 x parallel.pp=2 = 4 does not divide the 6 rank(s) of this job; set run.world_size to a multiple "
        "of 4"
    )
    with pytest.raises(UserError) as caught:
        Topology(6, engine_tp=4)
    assert str(caught.value) == "engine.tp=4 does not divide the 6 rank(s) of this job; use a divisor of 6"

"""The coordinates and groups of `Topology` equal those of Megatron's own process groups."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import Layout, ranks_of

EIGHT = [
    *(Layout(8, tp, pp) for tp, pp in ((1, 1), (2, 2), (4, 2), (8, 1), (1, 8))),
    Layout(8, cp=2),
    Layout(8, tp=2, pp=2, cp=2),
    Layout(8, tp=2, cp=2, ep=4),
    Layout(8, cp=2, pp=2, ep=2, etp=2),
]


def layouts_in_megatron(rank: int, layouts: list[Layout]) -> list[dict[str, Any]]:
    """Return for each layout this rank's coordinates and the members of its groups."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from grpo_mega.policy.build import init_groups

    places = []
    for layout in layouts:
        init_groups(ranks_of(rank, layout), 60.0)
        places.append(
            {
                "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
                "pp_rank": parallel_state.get_pipeline_model_parallel_rank(),
                "cp_rank": parallel_state.get_context_parallel_rank(),
                "dp_rank": parallel_state.get_data_parallel_rank(),
                "ep_rank": parallel_state.get_expert_model_parallel_rank(),
                "etp_rank": parallel_state.get_expert_tensor_parallel_rank(),
                "edp_rank": parallel_state.get_expert_data_parallel_rank(),
                "tp_group": dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group()),
                "pp_group": dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()),
                "dp_group": dist.get_process_group_ranks(parallel_state.get_data_parallel_group()),
                "cp_group": dist.get_process_group_ranks(parallel_state.get_context_parallel_group()),
                "model_group": dist.get_process_group_ranks(parallel_state.get_model_parallel_group()),
                "is_last_stage": parallel_state.is_pipeline_last_stage(),
            }
        )
    return places


@pytest.fixture(scope="module")
def layouts_of_ranks(rank_pool: RankPool) -> list[list[dict[str, Any]]]:
    """Return the coordinates and groups of each rank and layout: [rank][layout]."""
    return rank_pool.call(8, layouts_in_megatron, EIGHT)


@pytest.mark.parametrize("layout", EIGHT, ids=str)
def test_coordinates_equal_the_ranks_in_megatrons_groups(
    layouts_of_ranks: list[list[dict[str, Any]]], layout: Layout
) -> None:
    for rank in range(8):
        at, place = layout.topology.coordinates(rank), layouts_of_ranks[rank][EIGHT.index(layout)]
        for axis in ("tp", "cp", "pp", "dp", "ep", "etp", "edp"):
            assert getattr(at, axis + "_rank") == place[axis + "_rank"], (rank, axis)
        assert ranks_of(rank, layout).is_last_stage == place["is_last_stage"]


@pytest.mark.parametrize("layout", EIGHT, ids=str)
def test_ranks_that_share_the_other_axes_form_megatrons_groups(
    layouts_of_ranks: list[list[dict[str, Any]]], layout: Layout
) -> None:
    at = [layout.topology.coordinates(rank) for rank in range(8)]
    for rank in range(8):
        place, me = layouts_of_ranks[rank][EIGHT.index(layout)], at[rank]
        same = {
            "tp_group": [
                o.rank for o in at if (o.cp_rank, o.dp_rank, o.pp_rank) == (me.cp_rank, me.dp_rank, me.pp_rank)
            ],
            "pp_group": [
                o.rank for o in at if (o.tp_rank, o.cp_rank, o.dp_rank) == (me.tp_rank, me.cp_rank, me.dp_rank)
            ],
            "dp_group": [
                o.rank for o in at if (o.tp_rank, o.cp_rank, o.pp_rank) == (me.tp_rank, me.cp_rank, me.pp_rank)
            ],
            "cp_group": [
                o.rank for o in at if (o.tp_rank, o.dp_rank, o.pp_rank) == (me.tp_rank, me.dp_rank, me.pp_rank)
            ],
            "model_group": [o.rank for o in at if (o.cp_rank, o.dp_rank) == (me.cp_rank, me.dp_rank)],
        }
        assert same == {name: place[name] for name in same}, rank


@pytest.mark.parametrize("layout", EIGHT, ids=str)
def test_the_loss_rank_of_a_replica_is_on_its_last_stage(
    layouts_of_ranks: list[list[dict[str, Any]]], layout: Layout
) -> None:
    for dp_rank in range(layout.topology.dp):
        place = layouts_of_ranks[layout.topology.loss_rank(dp_rank)][EIGHT.index(layout)]
        assert (place["dp_rank"], place["tp_rank"], place["is_last_stage"]) == (dp_rank, 0, True)

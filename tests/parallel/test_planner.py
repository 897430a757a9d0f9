"""The planner predicts the bytes of real runs: weights, gradients and optimizer within 1%, activations within 10%.

This includes what is on the device in each phase, because policy and engine take turns there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.ranks import RankPool
from tools.memory.cases import CASES, Bytes, Case, make_model, measured, planned_ranks, predicted, resident

if TYPE_CHECKING:  # pytest's own process stays free of Megatron
    from grpo_mega.parallel.ranks import Ranks

EXACT, ACTIVATIONS = 0.01, 0.10  # relative
MUON = Case("MoE ep2 bf16 muon", "moe", 2, dtype="bf16", parallel={"ep": 2}, optimizer={"name": "muon"})
SHORT = ("dense pp2 vpp2", "MLA tp2 pp2 sp", MUON.name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory_models")
    for name in {case.model for case in CASES}:
        make_model(folder / name, name)
    return folder


def on_rank(rank: int, case: Case, folder: Path) -> Bytes:
    return measured(case, folder, _ranks(rank, case, folder))


def on_planner(_rank: int, case: Case, folder: Path) -> list[Bytes]:
    with _without_process_group():
        return predicted(case, folder)


@contextmanager
def _without_process_group() -> Iterator[None]:
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()  # the planner counts it in a separate category
    yield
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def phases_on_rank(rank: int, case: Case, folder: Path) -> dict[str, dict[str, int]]:
    return resident(case, folder, _ranks(rank, case, folder))


def phases_on_planner(_rank: int, case: Case, folder: Path) -> list[dict[str, dict[str, float]]]:
    """Return phase -> part -> bytes of each pipeline rank."""
    names = {"params": "weights", "grads": "gradients", "optimizer": "optimizer"}
    with _without_process_group():
        return [
            {
                phase: {part: items.get(name, 0.0) for part, name in names.items()}
                for phase, items in rank.phases.items()
            }
            for rank in planned_ranks(case, folder)
        ]


def _ranks(rank: int, case: Case, folder: Path) -> Ranks:
    import torch

    from grpo_mega.parallel.ranks import Ranks
    from grpo_mega.parallel.topology import Topology

    topology = Topology.of(case.config(folder), case.world)
    return Ranks(topology, topology.coordinates(rank), torch.device("cpu"))


EACH_CASE = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name.replace(" ", "-"), marks=() if case.name in SHORT else (pytest.mark.long,))
        for case in (*CASES, MUON)
    ],
)


@EACH_CASE
def test_predicted_bytes_match_a_real_run(case: Case, models: Path, rank_pool: RankPool) -> None:
    folder = models / case.model
    (stages,) = rank_pool.call(1, on_planner, case, folder)
    ranks = rank_pool.call(case.world, on_rank, case, folder)
    each = case.world // len(stages)
    for pp_rank, wanted in enumerate(stages):
        found = ranks[pp_rank * each : (pp_rank + 1) * each]
        for name, tolerance in (("weights", EXACT), ("gradients", EXACT), ("optimizer", EXACT)):
            worst = max(getattr(rank, name) for rank in found)
            assert getattr(wanted, name) == pytest.approx(worst, rel=tolerance), f"{name} of pipeline rank {pp_rank}"
        mean = sum(rank.activations for rank in found) / each  # experts receive different numbers of tokens
        assert wanted.activations == pytest.approx(mean, rel=ACTIVATIONS), f"activations of pipeline rank {pp_rank}"


@EACH_CASE
def test_what_is_on_the_device_in_each_phase_is_what_the_planner_says(
    case: Case, models: Path, rank_pool: RankPool
) -> None:
    folder = models / case.model
    (stages,) = rank_pool.call(1, phases_on_planner, case, folder)
    ranks = rank_pool.call(case.world, phases_on_rank, case, folder)
    each = case.world // len(stages)
    for pp_rank, wanted in enumerate(stages):
        found = ranks[pp_rank * each : (pp_rank + 1) * each]
        for phase, parts in wanted.items():
            for part, num_bytes in parts.items():
                worst = max(rank[phase][part] for rank in found)
                assert worst == pytest.approx(num_bytes, rel=EXACT), f"{part} in {phase} of pipeline rank {pp_rank}"

"""Memory that a sleeping engine keeps on a GPU, by hand, for each thing that decides it."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_mega.models.engine_memory import EngineShare
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.engine_residue import EngineResidue, num_communicators
from grpo_mega.planner.hardware import GIB
from grpo_mega.planner.phase_memory import num_groups
from tests.helpers.planner_cases import config_of, inputs_of, memory_of, spec_of

KERNELS, GRAPHS, COMMUNICATOR, CONTEXT, GROUP = 1.0 * GIB, 1.0 * GIB, 0.5625 * GIB, 0.6 * GIB, 0.35 * GIB


def residue_of(world: int = 4, family: str = "llama", gpu: str = "h100-80g", **engine: Any) -> EngineResidue:
    return EngineResidue.from_inputs(inputs_of(config_of(engine=engine), spec_of(family), world, gpu))


def phases_of(world: int = 4, **engine: Any) -> dict[str, dict[str, float]]:
    (rank,) = memory_of(config_of(engine=engine), spec_of(), world).ranks
    return rank.phases


@pytest.mark.parametrize(
    ("family", "world", "engine", "number"),
    [
        ("llama", 4, {}, 0),
        ("llama", 4, {"tp": 2}, 1),
        ("mixtral", 4, {}, 0),
        ("mixtral", 4, {"tp": 2}, 2),  # tp, and the ranks that share the experts
        ("mixtral", 4, {"tp": 2, "dp": 2}, 3),
        ("mixtral", 4, {"tp": 2, "dp": 2, "ep": 4}, 3),
        ("mixtral", 4, {"kind": "sglang", "tp": 2}, 1),
        ("llama", 4, {"kind": "sglang"}, 0),
    ],
)
def test_an_engine_rank_has_a_communicator_for_each_of_its_groups(
    family: str, world: int, engine: dict[str, Any], number: int
) -> None:
    assert num_communicators(inputs_of(config_of(engine=engine), spec_of(family), world)) == number


def test_a_sleeping_vllm_keeps_its_kernels_and_neither_graphs_nor_communicators() -> None:
    found = residue_of(tp=2)
    assert (found.context, found.communicators, found.graphs) == (0, COMMUNICATOR, GRAPHS)
    assert found.asleep == KERNELS
    phases = phases_of(tp=2)
    assert phases["train"]["engine asleep"] == phases["log_probs"]["engine asleep"] == KERNELS


def test_a_sleeping_sglang_keeps_graphs_and_communicators_and_its_own_context() -> None:
    found = residue_of(kind="sglang", tp=2)
    assert found.context == CONTEXT
    assert found.asleep == pytest.approx(KERNELS + GRAPHS + COMMUNICATOR)
    vllm, sglang = phases_of(tp=2), phases_of(kind="sglang", tp=2)
    assert sglang["train"]["CUDA and NCCL"] - vllm["train"]["CUDA and NCCL"] == pytest.approx(CONTEXT)
    assert sglang["rollout"]["CUDA and NCCL"] - vllm["rollout"]["CUDA and NCCL"] == pytest.approx(CONTEXT)


@pytest.mark.parametrize(("kind", "argument"), [("vllm", "enforce_eager"), ("sglang", "disable_cuda_graph")])
def test_an_engine_without_graphs_neither_keeps_nor_copies_nor_reserves_them(kind: str, argument: str) -> None:
    eager = residue_of(kind=kind, args={argument: True})
    assert (eager.graphs, eager.copied_graphs, eager.asleep) == (0, 0, KERNELS)
    share = [
        EngineShare.of(config_of(engine={"kind": kind, "args": {argument: off}}), spec_of(), Topology(1), 80 * GIB)
        for off in (False, True)
    ]
    assert share[0].workspace - share[1].workspace == pytest.approx(GRAPHS)


def test_communicators_of_an_engine_that_is_awake_are_counted_beside_those_of_the_policy() -> None:
    # tp 1 on 4 ranks: data parallel, expert data parallel, dp x cp, and the world
    assert num_groups(Topology(4, engine_tp=2)) == 4
    policy = CONTEXT + 4 * GROUP
    phases = phases_of(tp=2)
    for phase in ("rollout", "sync"):
        assert phases[phase]["CUDA and NCCL"] == pytest.approx(policy + COMMUNICATOR), phase
    assert phases["train"]["CUDA and NCCL"] == pytest.approx(policy)


def test_graphs_and_kernels_wake_with_the_weights_of_a_sync() -> None:
    assert phases_of()["sync"]["engine workspace"] == pytest.approx(GRAPHS + KERNELS)


def test_the_devices_of_a_server_hold_no_communicator_of_the_policy() -> None:
    urls: dict[str, Any] = {"placement": "server", "urls": ("a:1", "a:2"), "tp": 2}
    phases = phases_of(**urls)
    assert phases["server"]["CUDA and NCCL"] == pytest.approx(CONTEXT + COMMUNICATOR)
    assert phases["train"]["CUDA and NCCL"] == pytest.approx(CONTEXT + 4 * GROUP)


def test_the_host_holds_the_graphs_of_the_sleeping_engines_of_a_node() -> None:
    vllm, sglang = (memory_of(config_of(engine={"kind": kind}), spec_of(), 4) for kind in ("vllm", "sglang"))
    assert vllm.host["engine graphs"] == pytest.approx(4 * GRAPHS)
    assert sglang.host["engine graphs"] == 0


def test_without_cuda_a_sleeping_engine_keeps_nothing() -> None:
    found = residue_of(gpu="cpu", tp=2)
    assert (found.context, found.communicators, found.graphs, found.asleep) == (0, 0, 0, 0)

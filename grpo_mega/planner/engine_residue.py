"""Memory of an engine on one GPU beside weights, KV cache and step buffers, and what of it stays while it sleeps.

The sources of the numbers are in docs/measurements/planner.md. Pure arithmetic. Asserted by
tests/unit/planner/test_engine_residue.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.models.engine_memory import ENGINE_KERNELS, SLEEP_MODES, SleepMode, graph_bytes
from grpo_mega.planner.inputs import PlanInputs


@dataclass(frozen=True)
class EngineResidue:
    """Bytes of an engine on one GPU beside its weights and its KV cache; all 0 without CUDA or without an engine."""

    context: float
    """CUDA context of SGLang's own process. vLLM shares the context of the training rank."""
    communicators: float
    """Buffers of NCCL."""
    graphs: float
    kernels: float
    """Loaded kernels and the buffers that they keep."""
    sleep_mode: SleepMode

    @classmethod
    def from_inputs(cls, inputs: PlanInputs) -> EngineResidue:
        """Return the bytes of the engine of this run."""
        kind, assumed = inputs.config.engine.kind, inputs.assumptions
        if inputs.is_cpu_job or not inputs.config.has_engine:
            return cls(0.0, 0.0, 0.0, 0.0, SLEEP_MODES[kind])
        return cls(
            context=assumed.context_bytes if kind == "sglang" else 0.0,
            communicators=assumed.engine_communicator * num_communicators(inputs),
            graphs=graph_bytes(kind, inputs.config.engine.args),
            kernels=ENGINE_KERNELS,
            sleep_mode=SLEEP_MODES[kind],
        )

    @property
    def asleep(self) -> float:
        """Bytes that stay while the engine sleeps, without the context."""
        graphs = 0.0 if self.sleep_mode.offloads_graphs else self.graphs
        communicators = 0.0 if self.sleep_mode.suspends_communicators else self.communicators
        return self.kernels + graphs + communicators

    @property
    def copied_graphs(self) -> float:
        """Bytes of CUDA graphs that are copied to the host when the engine sleeps, and back when it wakes."""
        return self.graphs if self.sleep_mode.offloads_graphs else 0.0


def num_communicators(inputs: PlanInputs) -> int:
    """Return the number of NCCL communicators of an engine rank.

    vLLM has one for each of its groups of more than one rank: tp, dp, and all ranks of the replica if the model has
    experts (distributed/parallel_state.py:2316). SGLang has one for the ranks of a replica.
    """
    topology = inputs.topology
    if inputs.config.engine.kind == "sglang":
        return int(topology.engine_tp > 1)
    experts = topology.engine_size if inputs.spec.moe is not None else 1
    return sum(size > 1 for size in (topology.engine_tp, topology.engine_dp, experts))

"""Memory of each pipeline rank in each phase of a step, item by item (the phases: grpo_mega/trainer/phases.py).

Pure arithmetic. Asserted by tests/unit/planner/test_phase_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.models.module_sizes import ModuleSizes
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.activations import Activations
from grpo_mega.planner.engine_memory import EngineMemory
from grpo_mega.planner.engine_residue import EngineResidue
from grpo_mega.planner.inputs import PlanInputs
from grpo_mega.planner.pipeline_schedule import peak_of_schedule
from grpo_mega.planner.static_memory import ModelChunk, StaticBytes, model_chunks, static_bytes

PHASES = ("rollout", "log_probs", "train", "sync")
"""Phases of a run. A run with a critic also has `value`; a run with engine servers also has `server`. Supervised
fine-tuning has no `log_probs`, and without an evaluation only `train`."""

Items = dict[str, float]
"""Item -> bytes."""


@dataclass(frozen=True)
class RankMemory:
    """Memory of every rank of one pipeline rank."""

    pp_rank: int
    static: StaticBytes
    activations: float
    phases: dict[str, Items]

    def peak(self, phase: str) -> float:
        """Return the bytes of all items of a phase."""
        return sum(self.phases[phase].values())


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of the whole job."""

    ranks: list[RankMemory]
    engine: EngineMemory
    host: Items
    """Host memory of one node."""
    checkpoint: float
    """Bytes of one checkpoint on disk."""

    @property
    def phases(self) -> list[str]:
        """The names of the phases."""
        return list(self.ranks[0].phases)

    def fullest(self, phase: str) -> RankMemory:
        """Return the pipeline rank with the most bytes in a phase."""
        return max(self.ranks, key=lambda rank: rank.peak(phase))


def plan_memory(inputs: PlanInputs, sizes: ModuleSizes, *, total_parameters: int, where: str) -> MemoryPlan:
    """Return the bytes of every phase.

    Args:
        inputs: the run.
        sizes: the model's modules on one rank of the tensor- and expert-parallel axes.
        total_parameters: of the whole model.
        where: what error messages call the source of the model.

    Raises:
        UserError: the layers do not divide into the pipeline stages, or the engine does not hold one rollout.
    """
    config, itemsize = inputs.config, inputs.itemsize
    activations, engine = Activations(inputs), EngineMemory.from_inputs(inputs)
    num_microbatches = inputs.workload.num_microbatches
    ranks = []
    for pp_rank, chunks in enumerate(model_chunks(inputs.spec, config, where)):
        stage = _Stage(
            chunks,
            static_bytes(chunks, sizes, inputs),
            activation_bytes(activations, chunks, config.parallel.pp, pp_rank, num_microbatches),
        )
        phases = _phases(inputs, stage, activations, engine)
        ranks.append(RankMemory(pp_rank, stage.static, stage.activations, phases))
    parameters = sum(rank.static.parameters for rank in ranks)
    one_moment = sum(rank.static.one_moment for rank in ranks) / parameters if parameters else 0.0
    # a master weight and two moments in float32, also in a float32 run; Muon's matrices have one moment
    state = itemsize + 12 - 4 * one_moment
    reference = itemsize if config.algorithm.ref_update_every else 0
    learners = 2 if config.algorithm.needs_critic else 1
    return MemoryPlan(
        ranks=ranks,
        engine=engine,
        host=_host(inputs, ranks),
        checkpoint=float(total_parameters * (state * learners + reference)),
    )


@dataclass(frozen=True)
class _Stage:
    """One pipeline rank: its chunks, its static bytes, and the peak of its activations in an update."""

    chunks: list[ModelChunk]
    static: StaticBytes
    activations: float


def activation_bytes(
    activations: Activations, chunks: list[ModelChunk], pp: int, pp_rank: int, num_microbatches: int
) -> float:
    """Return the peak bytes of activations on one rank: all microbatches in flight, and the largest recomputed part.

    Args:
        activations: bytes of one microbatch in each chunk.
        chunks: the vpp chunks of this pipeline rank.
        pp: number of pipeline ranks.
        pp_rank: this pipeline rank.
        num_microbatches: microbatches of one update; with vpp > 1 a multiple of pp.
    """
    kept, recomputed = zip(*(activations.chunk(chunk) for chunk in chunks), strict=True)
    peak, _ = peak_of_schedule(kept, pp, pp_rank, num_microbatches)
    return peak + float(max(recomputed))


def _phases(
    inputs: PlanInputs, stage: _Stage, activations: Activations, engine: EngineMemory
) -> dict[str, dict[str, float]]:
    """Return phase -> item -> bytes of one pipeline rank."""
    residue = EngineResidue.from_inputs(inputs)
    phases = _policy_phases(inputs, stage, activations, residue)
    if inputs.config.is_sft:
        del phases["log_probs"]
    if inputs.config.has_engine:
        phases |= _engine_phases(inputs, stage, engine, residue)
    phases = {name: phases[name] for name in (*PHASES, "server") if name in phases}
    if inputs.config.algorithm.needs_critic:  # the policy's modules with a head of one row, counted as the policy's
        phases["value"] = {name: size for name, size in phases["train"].items() if name != "logits"}
        phases["value"] |= _offloaded_policy(inputs, stage.static)
    for name, items in phases.items():
        used = sum(items.values())
        items["CUDA and NCCL"] = _contexts_and_communicators(inputs, residue, name)
        items["allocator"] = inputs.assumptions.allocator_share * used
    return phases


def _contexts_and_communicators(inputs: PlanInputs, residue: EngineResidue, phase: str) -> float:
    """Return the bytes of CUDA contexts and of NCCL in a phase; those of a sleeping engine are in `engine asleep`."""
    assumed = inputs.assumptions
    if phase == "server":
        return assumed.context_bytes + residue.communicators
    policy = assumed.context_bytes + assumed.nccl_bytes_per_group * num_groups(inputs.topology)
    if inputs.uses_servers:
        return policy
    return policy + residue.context + (residue.communicators if phase in ("rollout", "sync") else 0.0)


def _training_state(static: StaticBytes) -> Items:
    """Return what is on the device whenever the policy computes."""
    items: Items = {"weights": static.weights, "gradients": static.gradients, "optimizer": static.optimizer}
    return items | ({"FP8 copies": static.fp8_copies} if static.fp8_copies else {})


def _offloaded_policy(inputs: PlanInputs, static: StaticBytes) -> Items:
    """Return what stays on the device while the policy is offloaded."""
    items: Items = {"policy offloaded": inputs.assumptions.policy_residue}
    fp8 = inputs.config.precision.fp8
    if static.fp8_copies and fp8 is not None and fp8.params and fp8.recipe == "mxfp8":  # cannot be made from the rows
        items["FP8 copies"] = static.fp8_copies
    return items


def _policy_phases(
    inputs: PlanInputs, stage: _Stage, activations: Activations, engine: EngineResidue
) -> dict[str, Items]:
    """Return the phases in which the policy computes: log_probs and train."""
    topology, static, chunks = inputs.topology, stage.static, stage.chunks
    state = _training_state(static)
    logits = activations.logits() if any(chunk.has_head for chunk in chunks) else 0.0
    messages = 2 * activations.message * topology.pp if topology.pp > 1 else 0.0
    transient = max(activations.transient(chunk) for chunk in chunks) + messages
    largest_layer = max(
        (activations.layer(*layer).kept for chunk in chunks for layer in set(chunk.layers)), default=0.0
    )
    copies = topology.dp * topology.cp
    # A rank's shard of the reference is on the device before it is gathered. A whole reference is copied in place.
    reference = static.weights / copies if inputs.config.needs_reference and copies > 1 else 0.0
    engine_sleeps = inputs.config.has_engine and not inputs.uses_servers
    residue = {"engine asleep": engine.asleep} if engine_sleeps else {}
    return {
        "log_probs": {
            **state,
            "activations": largest_layer,
            "logits": logits,
            "communication": transient + reference,
            **residue,
        },
        "train": {
            **state,
            "activations": stage.activations,
            "logits": logits,
            "communication": transient,
            **residue,
            # the activations are released before the optimizer's step
            **_more_than("orthogonalization", static.orthogonalization, stage.activations + logits),
        },
    }


def _more_than(name: str, needed: float, released: float) -> Items:
    """Return what an item needs beside memory that was released before it."""
    return {name: needed - released} if needed > released else {}


def _engine_phases(inputs: PlanInputs, stage: _Stage, engine: EngineMemory, residue: EngineResidue) -> dict[str, Items]:
    """Return the phases in which an engine computes or receives weights: rollout, sync, and server."""
    static = stage.static
    engine_weights = {"engine weights": engine.weights}
    sampling = {**engine_weights, "KV cache": engine.kv_cache, "engine workspace": engine.workspace}
    buckets = {"sync buckets": 2.0 * inputs.config.weight_sync.bucket_bytes}
    if not inputs.uses_servers:
        return {
            "rollout": sampling | _offloaded_policy(inputs, static),
            "sync": {
                "weights": static.weights,
                **engine_weights,
                "engine workspace": residue.graphs + residue.kernels,  # which wake with the weights
                **buckets,
            },
        }
    # The policy stays on its devices. `server` is a device of an engine server, where the engine never sleeps.
    state = _training_state(static)
    return {"rollout": dict(state), "sync": {**state, **buckets}, "server": sampling | buckets}


def num_groups(topology: Topology) -> int:
    """Return the number of communicators of more than one rank that a rank of the policy belongs to.

    They are the axes, the products of axes that are used together, and the whole world.
    """
    axes = (topology.tp, topology.cp, topology.dp, topology.pp, topology.ep, topology.etp, topology.edp)
    products = (topology.tp * topology.pp, topology.dp * topology.cp, topology.world_size)
    return sum(size > 1 for size in (*axes, *products))


def _host(inputs: PlanInputs, ranks: list[RankMemory]) -> Items:
    """Return the host memory of the fullest node.

    It holds the processes, what leaves the device (pinned copies on CUDA, which are kept while the policy computes and
    is saved), the CUDA graphs of a sleeping engine, the optimizer state that is updated on the host with its gradients,
    the reference, and what a save copies on each rank: everything that it saves, or one tensor at a time without
    `checkpoint.asynchronous`.
    """
    topology, algorithm, needs_reference = inputs.topology, inputs.config.algorithm, inputs.config.needs_reference
    ranks_per_node = min(inputs.gpu.per_node, topology.world_size)
    static = max(ranks, key=lambda rank: rank.static.weights).static
    offloads = inputs.policy_is_offloaded
    keeps_weights = offloads or needs_reference  # the reference takes the place of the policy's weights
    reference = static.weights / (topology.dp * topology.cp) if needs_reference else 0.0
    learners = 2 if algorithm.needs_critic else 1
    # 12 bytes of state and 4 of gradient for each parameter that the host updates
    updated = static.optimizer_on_host * 4 / 3
    items = {
        "processes": inputs.assumptions.process_host_bytes,
        "offloaded weights": learners * static.weights if keeps_weights else 0.0,
        "offloaded optimizer": learners * static.optimizer if offloads else 0.0,
        "engine graphs": 0.0 if inputs.uses_servers else EngineResidue.from_inputs(inputs).copied_graphs,
        "optimizer on the host": learners * updated,
        "reference": reference,
        "checkpoint": _copied_by_a_save(inputs, static, max(rank.static.largest_state for rank in ranks)),
    }
    return {name: ranks_per_node * size for name, size in items.items()}


def _copied_by_a_save(inputs: PlanInputs, static: StaticBytes, largest_state: int) -> float:
    """Return the bytes in host memory that a save copies on one rank (formats/file_parts.py).

    Each rank saves weights of as many elements as the part of the optimizer state that it holds.
    """
    config = inputs.config
    if not config.checkpoint.asynchronous:
        return float(largest_state)
    learners = 2 if config.algorithm.needs_critic else 1
    reference = inputs.itemsize if config.algorithm.ref_update_every else 0
    state = 12  # master weight and moments, in float32
    held = static.optimizer + static.optimizer_on_host
    elements = held / (state if inputs.itemsize < 4 else state - 4)  # in fp32 the weights are their own masters
    return elements * (learners * (inputs.itemsize + state) + reference)

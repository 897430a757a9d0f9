"""Seconds of each phase of a step: operations over peak rates and bytes over link speeds, with stated efficiencies.

The seconds are predictions, not measurements; planner/hardware.py holds every assumption. Pure arithmetic.
The operations are those of models/flops.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_mega.config.schema import Config
from grpo_mega.models.flops import TRAINED_PASSES, attention_flops, weights_per_token
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.engine_residue import EngineResidue
from grpo_mega.planner.inputs import PlanInputs
from grpo_mega.planner.phase_memory import MemoryPlan
from grpo_mega.planner.rollout_time import rollout_seconds
from grpo_mega.planner.static_memory import StaticBytes


@dataclass(frozen=True)
class StepTime:
    """Seconds, tokens and operations of one step.

    `phases` maps a name to seconds. `optimizer` is not part of `train`, because it may run on the host.
    """

    phases: dict[str, float]
    tokens: float
    model_flops: float

    @property
    def seconds(self) -> float:
        """Seconds of one step."""
        return sum(self.phases.values())


@dataclass(frozen=True)
class TokenCost:
    """Cost of one token, over all ranks."""

    active: float
    """Weights that the token is multiplied with."""
    attention_flops: float

    @property
    def forward(self) -> float:
        """Operations of the forward pass."""
        return 2 * self.active + self.attention_flops


def token_cost(spec: ModelSpec, mean_length: float) -> TokenCost:
    """Return the cost of one token of a rollout (models/flops.py).

    Args:
        spec: the model.
        mean_length: mean tokens of a rollout, over which attention is computed.
    """
    return TokenCost(weights_per_token(spec).total, attention_flops(spec, [mean_length]) / mean_length)


def plan_time(inputs: PlanInputs, memory: MemoryPlan) -> StepTime:
    """Return the seconds of one step of rollouts of mean length; the longest one reaches sampling.max_tokens.

    In supervised fine-tuning a step has examples in place of rollouts, and no evaluation.

    Args:
        inputs: the run, its cluster and the assumed efficiencies.
        memory: bytes of weights, optimizer state, KV cache and checkpoint.
    """
    config, topology, assumed, gpu = inputs.config, inputs.topology, inputs.assumptions, inputs.gpu
    work = inputs.workload
    cost = token_cost(inputs.spec, work.mean)
    tokens = work.rollouts * work.mean
    efficiency = assumed.expert_flops if inputs.spec.moe is not None else assumed.dense_flops
    efficiency *= assumed.fp8_speedup if config.precision.fp8 is not None else 1.0
    rate = topology.world_size * gpu.bf16_flops * efficiency
    rows_of_pass = tokens / topology.dp / work.row_tokens
    rows = math.ceil(rows_of_pass / config.train.minibatches_per_epoch)
    epochs = config.train.epochs_per_rollout
    recomputed = 1 / 3 if config.parallel.recompute == "full" else 0.0
    computed_once = tokens * cost.forward / rate
    messages = _message_seconds(inputs, tokens / topology.dp)
    # the rows of all minibatches are one schedule in a pass without gradients
    forward = computed_once * _with_bubble(topology, math.ceil(rows_of_pass)) + messages.forward
    computed = (3 + recomputed) * computed_once * _with_bubble(topology, rows)
    exchanged = messages.forward + messages.backward
    passes = _policy_passes(config) + (1 if config.needs_reference else 0)
    static = max((rank.static for rank in memory.ranks), key=lambda s: s.weights)
    pcie = gpu.pcie * assumed.pcie
    offload = 2 * (static.weights + static.optimizer) / pcie
    graphs = 0.0 if inputs.uses_servers else 2 * EngineResidue.from_inputs(inputs).copied_graphs / pcie
    checkpoint = memory.checkpoint / inputs.cluster.num_nodes / assumed.checkpoint_bandwidth
    phases = {
        "rollout": rollout_seconds(inputs, memory.engine, cost.forward, cost.active),
        "log_probs": passes * forward,
        "train": epochs * (computed + exchanged)
        + work.updates * _exposed_gradient_seconds(inputs, static, epochs * computed / work.updates / max(1, rows)),
        "optimizer": work.updates * _optimizer_seconds(inputs, static),
        "offload": (offload if inputs.policy_is_offloaded else 0.0) + graphs,
        "sync": _sync_seconds(inputs, memory.engine.weights),
        "checkpoint": checkpoint / (config.checkpoint.every or config.train.steps),
    }
    if config.is_sft:  # an evaluation is not part of a step
        phases = {name: phases[name] for name in ("train", "optimizer", "checkpoint")}
    if config.algorithm.needs_critic:  # its values, its updates, and two more copies over PCIe
        phases["value"] = forward + phases["train"] + phases["optimizer"] + offload
    return StepTime(phases, tokens, TRAINED_PASSES * tokens * cost.forward)


def _policy_passes(config: Config) -> float:
    """Return the fraction of the batch whose log-probs before the update need a pass of the policy.

    The first update's forward pass gives those of the first minibatch (trainer/learning.py).
    """
    algorithm, minibatches = config.algorithm, config.train.minibatches_per_epoch
    if algorithm.old_log_probs == "sampler":
        return 0.0
    if algorithm.kl_in == "reward" and algorithm.needs_reference:
        return 1.0
    return (minibatches - 1) / minibatches


def _with_bubble(topology: Topology, rows: int) -> float:
    """Return the seconds of a pipeline schedule over those of its computation."""
    return 1 + (topology.pp - 1) / (max(1, rows) * topology.vpp)


@dataclass(frozen=True)
class MessageSeconds:
    """Seconds of activation messages that no computation hides."""

    forward: float
    backward: float


def _message_seconds(inputs: PlanInputs, tokens: float) -> MessageSeconds:
    """Return the seconds of activation messages for the tokens of one data-parallel rank.

    tp: two gathers and two scatters per layer in either direction (without sequence parallelism two sums, which move as
    much). In the backward pass those of a column-parallel module run beside its matrix products (Megatron-Core,
    tensor_parallel/layers.py, LinearWithGradAccumulationAndAsyncCommunication; Transformer Engine likewise), so the two
    gathers of the row-parallel ones are left. Nothing else is assumed to overlap with computation.
    """
    topology, spec, cluster, b = inputs.topology, inputs.spec, inputs.cluster, inputs.itemsize
    layers, hidden = spec.num_layers / topology.pp, spec.hidden_size * b * tokens / topology.cp
    forward = backward = 0.0
    if topology.tp > 1:
        message = layers * hidden * (topology.tp - 1) / topology.tp / cluster.link_speed(topology.tp)
        forward, backward = 4 * message, 2 * message
    if topology.cp > 1:  # keys and values are gathered forward and backward, their gradients scattered
        heads = spec.num_kv_heads * spec.head_dim * 2 * b * tokens / topology.cp / topology.tp
        message = layers * heads * (topology.cp - 1) / cluster.link_speed(topology.tp * topology.cp)
        forward, backward = forward + message, backward + 2 * message
    if spec.moe is not None and topology.ep > 1:  # to the experts and back
        moe_layers = sum(spec.moe.layers) / topology.pp
        routed = hidden / (topology.tp if inputs.config.parallel.sequence_parallel else 1) * spec.moe.top_k
        speed = cluster.link_speed(topology.ep * topology.etp)
        message = moe_layers * routed * (topology.ep - 1) / topology.ep / speed
        forward, backward = forward + 2 * message, backward + 2 * message
    return MessageSeconds(forward, backward)


def _gradient_seconds(inputs: PlanInputs, static: StaticBytes) -> float:
    """Return the seconds of reducing gradients and gathering weights, once per update."""
    copies = inputs.topology.dp * inputs.topology.cp
    if copies == 1:
        return 0.0
    moved = (static.gradients + static.weights) * (copies - 1) / copies
    return moved / inputs.cluster.link_speed(inputs.topology.tp * copies)


def _exposed_gradient_seconds(inputs: PlanInputs, static: StaticBytes, row_seconds: float) -> float:
    """Return the part of `_gradient_seconds` that is not hidden behind the computation of one row.

    With overlap, gradients are reduced during the backward pass of the last row of an update (two thirds of its time),
    and weights are gathered during the forward pass of the next one.
    """
    seconds = _gradient_seconds(inputs, static)
    reduced = seconds * static.gradients / (static.gradients + static.weights)
    gathered = seconds - reduced
    if inputs.parallel.overlap_grad_reduce:
        reduced = max(0.0, reduced - row_seconds * 2 / 3)
    if inputs.parallel.overlap_param_gather:
        gathered = max(0.0, gathered - row_seconds / 3)
    return reduced + gathered


def _optimizer_seconds(inputs: PlanInputs, static: StaticBytes) -> float:
    """Return the seconds of reading and writing the optimizer state.

    On the host they are those of the host's memory, with gradients and weights copied over PCIe.
    """
    assumed, gpu = inputs.assumptions, inputs.gpu
    on_device = 2.5 * static.optimizer / (gpu.memory_bandwidth * assumed.decode_bandwidth)
    if not static.optimizer_on_host:
        return on_device
    parameters = static.optimizer_on_host / 12
    moved = parameters * (4 + 2) / (gpu.pcie * assumed.pcie)
    updated = parameters * 28 * gpu.per_node / assumed.host_adam_bandwidth
    return on_device + moved + updated


def _sync_seconds(inputs: PlanInputs, stored_bytes: float) -> float:
    """Return the seconds in which an engine rank receives what it lacks over one link and writes it.

    The reshard plan (weight_sync/plan.py) takes less time where a node holds a part of what its engine ranks lack.
    """
    topology, cluster = inputs.topology, inputs.cluster
    ranks = topology.tp * topology.pp * topology.ep
    written = stored_bytes / (inputs.gpu.memory_bandwidth * inputs.assumptions.decode_bandwidth)
    if inputs.uses_servers:  # all bytes travel between nodes, from all ranks of the policy
        sent = max(1.0, topology.num_server_ranks / topology.world_size) * stored_bytes
        return sent / cluster.link_speed(inputs.gpu.per_node + 1) + written
    if ranks == 1:
        return written
    return stored_bytes * (ranks - 1) / ranks / cluster.link_speed(ranks) + written

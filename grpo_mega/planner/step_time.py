"""Seconds of each phase of a step: operations over peak rates, bytes over link speeds, each with its stated efficiency.

Predictions, not measurements: planner/hardware.py holds every assumption. Pure arithmetic.
Source of the operation counts: 2 per weight and token forward, 4 backward (arXiv:2104.04473, appendix); attention
L n (qk + v) per token and layer, causal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_mega.config.schema import Config
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.hardware import Cluster
from grpo_mega.planner.phase_memory import MemoryPlan, Workload
from grpo_mega.planner.static_memory import ITEMSIZE, StaticBytes


@dataclass(frozen=True)
class StepTime:
    """`phases`: name -> seconds; `train` is without `optimizer`, which is named apart because it may be the host's."""

    phases: dict[str, float]
    tokens: float
    model_flops: float

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(self.phases.values())


@dataclass(frozen=True)
class Costs:
    """What one token costs. `active`: weights that a token meets, of all ranks."""

    active: float
    attention_flops: float

    @property
    def forward(self) -> float:
        """Operations."""
        return 2 * self.active + self.attention_flops


def token_costs(spec: ModelSpec, total_parameters: int, mean_length: float) -> Costs:
    """Without the embedding, which is looked up, and with `top_k` of the experts."""
    active = float(total_parameters)
    if not spec.tie_embeddings:
        active -= spec.vocab_size * spec.hidden_size
    if spec.moe is not None:
        experts = sum(spec.moe.layers) * 3 * spec.hidden_size * spec.moe.expert_ffn_size
        active -= experts * (spec.moe.num_experts - spec.moe.top_k)
    qk_and_v = 2 * spec.head_dim
    if spec.mla is not None:
        qk_and_v = spec.mla.nope_dim + spec.mla.rope_dim + spec.mla.v_dim
    return Costs(active, spec.num_layers * mean_length * spec.num_heads * qk_and_v)


def plan_time(
    config: Config,
    spec: ModelSpec,
    topology: Topology,
    cluster: Cluster,
    memory: MemoryPlan,
    work: Workload,
    total_parameters: int,
) -> StepTime:
    """One step of rollouts of mean length (the longest one reaches sampling.max_tokens)."""
    assumed, gpu = cluster.assumptions, cluster.gpu
    costs = token_costs(spec, total_parameters, work.mean)
    tokens = work.rollouts * work.mean
    share = assumed.expert_flops if spec.moe is not None else assumed.dense_flops
    share *= assumed.fp8_speedup if config.precision.fp8 is not None else 1.0
    rate = topology.world_size * gpu.bf16_flops * share
    rows = math.ceil(tokens / config.train.minibatches_per_epoch / topology.dp / work.row_tokens)
    bubble = 1 + (topology.pp - 1) / (max(1, rows) * topology.vpp)
    epochs = config.train.epochs_per_rollout
    again = 1 / 3 if config.parallel.recompute == "full" else 0.0
    messages = _messages(config, spec, topology, cluster, tokens / topology.dp)
    forward = tokens * costs.forward / rate * bubble + messages / 3
    passes = (1 if work.updates > 1 else 0) + (1 if config.algorithm.needs_reference else 0)
    static = max((rank.static for rank in memory.ranks), key=lambda s: s.weights)
    stays = topology.engine_servers > 0 and not config.algorithm.needs_critic  # nothing leaves the policy's devices
    phases = {
        "rollout": _rollout(config, spec, topology, cluster, memory, work, costs),
        "log_probs": passes * forward,
        "train": epochs * ((3 + again) * tokens * costs.forward / rate * bubble + messages)
        + work.updates * _gradients(static, topology, cluster),
        "optimizer": work.updates * _optimizer(static, cluster),
        "offload": 0.0 if stays else 2 * (static.weights + static.optimizer) / (gpu.pcie * assumed.pcie),
        "sync": _sync(topology, cluster, memory.engine_weights),
        "checkpoint": memory.checkpoint
        / cluster.num_nodes
        / assumed.checkpoint_bandwidth
        / (config.checkpoint.every or config.train.steps),
    }
    if config.algorithm.needs_critic:  # its values, its updates, and two more trips over PCIe
        phases["value"] = forward + phases["train"] + phases["optimizer"] + phases["offload"]
    return StepTime(phases, tokens, 3 * tokens * costs.forward)


def _rollout(
    config: Config,
    spec: ModelSpec,
    topology: Topology,
    cluster: Cluster,
    memory: MemoryPlan,
    work: Workload,
    costs: Costs,
) -> float:
    """Prefill of each prompt once, then decode steps that read weights and cache; the last round lasts as long as its
    longest rollout."""
    assumed, gpu, tp = cluster.assumptions, cluster.gpu, config.engine.tp
    of_share = math.ceil(work.rollouts / topology.num_shares)
    held = memory.kv_cache / (memory.kv_bytes_per_token * max(1.0, work.mean))
    at_once = max(1.0, min(of_share, config.engine.max_num_seqs, held))
    rounds = math.ceil(of_share / at_once)
    weights = memory.engine_weights
    if spec.moe is not None:
        share = spec.moe.top_k / spec.moe.num_experts
        expert = sum(spec.moe.layers) * 3 * spec.hidden_size * spec.moe.expert_ffn_size * spec.moe.num_experts
        experts = expert * (1 if config.engine.fp8 else ITEMSIZE[config.precision.dtype]) / topology.engine_size
        weights -= experts * (1 - share) ** (at_once * topology.engine_dp)
    read = (weights + at_once * work.mean * memory.kv_bytes_per_token) / (
        gpu.memory_bandwidth * assumed.decode_bandwidth
    )
    computed = at_once * 2 * costs.active / tp / (gpu.bf16_flops * assumed.prefill_flops)
    latency = 2 * spec.num_layers * assumed.collective_latency if tp > 1 else 0.0
    if spec.moe is not None and topology.engine_dp > 1:  # tokens gathered before the experts, their sums given back
        latency += 2 * sum(spec.moe.layers) * assumed.collective_latency
    decode = max(read, computed) + latency
    steps = (rounds - 1) * assumed.mean_length * config.sampling.max_tokens + config.sampling.max_tokens
    prompts = config.data.prompts_per_step * config.data.max_prompt_tokens * assumed.mean_length
    devices = topology.num_server_ranks or topology.world_size
    prefill = prompts * costs.forward / (devices * gpu.bf16_flops * assumed.prefill_flops)
    return steps * decode + prefill


def _messages(config: Config, spec: ModelSpec, topology: Topology, cluster: Cluster, tokens: float) -> float:
    """Of activations, forward and backward, for so many tokens of one data-parallel rank; none of it overlapped."""
    parallel, b = config.parallel, ITEMSIZE[config.precision.dtype]
    layers, hidden = spec.num_layers / topology.pp, spec.hidden_size * b * tokens / topology.cp
    seconds = 0.0
    if topology.tp > 1:  # two gathers and two scatters a layer forward, as many backward
        seconds += 8 * layers * hidden * (topology.tp - 1) / topology.tp / cluster.link_speed(topology.tp)
    if topology.cp > 1:  # keys and values gathered forward and backward, their gradients scattered
        heads = spec.num_kv_heads * spec.head_dim * 2 * b * tokens / topology.cp / topology.tp
        seconds += 3 * layers * heads * (topology.cp - 1) / cluster.link_speed(topology.tp * topology.cp)
    if spec.moe is not None and topology.ep > 1:  # there and back, forward and backward
        moe_layers = sum(spec.moe.layers) / topology.pp
        routed = hidden / (topology.tp if parallel.sequence_parallel else 1) * spec.moe.top_k
        speed = cluster.link_speed(topology.ep * topology.etp)
        seconds += 4 * moe_layers * routed * (topology.ep - 1) / topology.ep / speed
    return seconds


def _gradients(static: StaticBytes, topology: Topology, cluster: Cluster) -> float:
    """Gradients reduced and weights gathered once an update."""
    copies = topology.dp * topology.cp
    if copies == 1:
        return 0.0
    moved = (static.gradients + static.weights) * (copies - 1) / copies
    return moved / cluster.link_speed(topology.tp * copies)


def _optimizer(static: StaticBytes, cluster: Cluster) -> float:
    """Reads and writes of the state; on the host at its speed, with gradients and weights going over PCIe."""
    assumed, gpu = cluster.assumptions, cluster.gpu
    on_device = 2.5 * static.optimizer / (gpu.memory_bandwidth * assumed.decode_bandwidth)
    if not static.optimizer_on_host:
        return on_device
    parameters = static.optimizer_on_host / 12
    moved = parameters * (4 + 2) / (gpu.pcie * assumed.pcie)
    updated = parameters * 28 * gpu.per_node / assumed.host_adam_bandwidth
    return on_device + moved + updated


def _sync(topology: Topology, cluster: Cluster, stored_bytes: float) -> float:
    """What an engine rank stores, less its share of the policy, over one link, then written. The reshard plan
    (weight_sync/plan.py) takes less time where a node holds a part of what its engine ranks lack."""
    ranks = topology.tp * topology.pp * topology.ep
    inside = stored_bytes / (cluster.gpu.memory_bandwidth * cluster.assumptions.decode_bandwidth)
    if topology.engine_servers:  # all of it travels, from all ranks of the policy, between nodes
        sent = max(1.0, topology.num_server_ranks / topology.world_size) * stored_bytes
        return sent / cluster.link_speed(cluster.gpu.per_node + 1) + inside
    if ranks == 1:
        return inside
    return stored_bytes * (ranks - 1) / ranks / cluster.link_speed(ranks) + inside

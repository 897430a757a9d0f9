"""Seconds of sampling: what a decode step reads, computes and exchanges, and how many steps a batch of rollouts takes.

Lengths of completions follow P(length > t) = (1 - t / M)^(1 / m - 1), where M is `sampling.max_tokens` and m the mean
as a fraction of M. With m = 1/2 they are uniform from 0 to M. The longest completion has M tokens.
Pure arithmetic. Asserted by tests/unit/planner/test_rollout_time.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_mega.models.engine_memory import ITEMSIZE
from grpo_mega.planner.engine_memory import EngineMemory
from grpo_mega.planner.inputs import PlanInputs


@dataclass(frozen=True)
class DecodeStep:
    """Seconds of one decode step of a replica, by cause."""

    memory: float
    """Reading the weights and the cache."""
    compute: float
    """Matrix products of the running rollouts."""
    collectives: float
    """Sums over the tensor-parallel ranks, and the exchange for experts."""
    engine: float
    """Work of the engine's processes on the host between two forward passes that the GPU waits for."""

    @property
    def seconds(self) -> float:
        """Seconds of the step. Reading memory and computing overlap; the rest does not."""
        return max(self.memory, self.compute) + self.collectives + self.engine


def rollout_seconds(inputs: PlanInputs, engine: EngineMemory, forward_flops: float, active: float) -> float:
    """Return the seconds of sampling: each prompt is computed once, then one decode step after the other.

    While finished rollouts are replaced, `at_once` rollouts run. The last of them then finish without replacement
    during M steps, in which m x `at_once` rollouts run on average.

    Args:
        inputs: the run.
        engine: its engine's memory.
        forward_flops: operations of one prompt token.
        active: weights that a token is multiplied with.
    """
    config, topology, assumed, work = inputs.config, inputs.topology, inputs.assumptions, inputs.workload
    rollouts = math.ceil(work.rollouts / topology.num_prompt_shards)
    at_once = rollouts_at_once(inputs, engine)
    longest, mean = config.sampling.max_tokens, assumed.mean_length
    replaced_steps = (rollouts / at_once - 1) * mean * longest
    full = decode_step(inputs, engine, at_once, active).seconds
    last = decode_step(inputs, engine, max(1.0, mean * at_once), active).seconds
    prompt_tokens = config.data.prompts_per_step * config.data.max_prompt_tokens * mean
    prefill = prompt_tokens / topology.num_prompt_shards * prefill_token_seconds(inputs, forward_flops)
    return replaced_steps * full + longest * last + prefill


def prefill_token_seconds(inputs: PlanInputs, forward_flops: float) -> float:
    """Return the seconds in which the ranks of one prompt shard compute one token of a prompt.

    Args:
        inputs: the run.
        forward_flops: operations of one prompt token.
    """
    rate = inputs.topology.engine_tp * inputs.gpu.bf16_flops * inputs.assumptions.prefill_flops
    return forward_flops / rate


def rollouts_at_once(inputs: PlanInputs, engine: EngineMemory) -> float:
    """Return the number of rollouts of a step that one prompt shard of an engine runs at the same time."""
    rollouts = math.ceil(inputs.workload.rollouts / inputs.topology.num_prompt_shards)
    return max(1.0, min(rollouts, running_limit(inputs, engine, inputs.workload.mean)))


def running_limit(inputs: PlanInputs, engine: EngineMemory, mean_tokens: float) -> float:
    """Return the most rollouts that one prompt shard of an engine can run at the same time.

    Args:
        inputs: the run.
        engine: its engine's memory.
        mean_tokens: mean tokens of a complete rollout, with its prompt.
    """
    fit_in_cache = engine.kv_cache / (engine.kv_bytes_per_token * max(1.0, mean_tokens))
    return max(1.0, min(inputs.config.engine.max_num_seqs, fit_in_cache))


def decode_step(
    inputs: PlanInputs, engine: EngineMemory, running: float, active: float, cached: float | None = None
) -> DecodeStep:
    """Return the seconds of a decode step with `running` rollouts in each prompt shard.

    A running rollout has P + M m / (1 + m) tokens in the cache on average, where P is the mean prompt: the mean of
    P + t over the tokens t of all rollouts, whose lengths have the mean square 2 (M m)^2 / (1 + m).

    Args:
        inputs: config, model, GPU and assumptions.
        engine: memory of the engine on one GPU.
        running: rollouts that sample at the same time in one prompt shard.
        active: parameters that a token uses.
        cached: mean tokens of a running rollout in the cache; None: the mean that is given above.
    """
    config, assumed, gpu = inputs.config, inputs.assumptions, inputs.gpu
    mean, longest = assumed.mean_length, config.sampling.max_tokens
    if cached is None:
        cached = config.data.max_prompt_tokens * mean + longest * mean / (1 + mean)
    read = _weights_read(inputs, engine, running) + running * cached * engine.kv_bytes_per_token
    return DecodeStep(
        memory=read / (gpu.memory_bandwidth * assumed.decode_bandwidth),
        compute=running * 2 * active / config.engine.tp / (gpu.bf16_flops * assumed.prefill_flops),
        collectives=_collective_seconds(inputs, running),
        engine=assumed.engine_step - _hidden_scheduling(inputs, running),
    )


def _hidden_scheduling(inputs: PlanInputs, running: float) -> float:
    """Return the seconds of `Assumptions.engine_step` that pass while the GPU computes."""
    if inputs.is_cpu_job or inputs.config.engine.kind != "vllm":
        return 0.0
    return min(inputs.assumptions.engine_step, inputs.assumptions.scheduling_ahead * running)


def _weights_read(inputs: PlanInputs, engine: EngineMemory, running: float) -> float:
    """Return the bytes of weights that a rank reads in a decode step: experts that no token is routed to are not."""
    moe, topology, config = inputs.spec.moe, inputs.topology, inputs.config
    if moe is None:
        return engine.weights
    elements = sum(moe.layers) * 3 * inputs.spec.hidden_size * moe.expert_ffn_size * moe.num_experts
    experts = elements * (1 if config.engine.fp8 else ITEMSIZE[config.precision.dtype]) / topology.engine_size
    unused_fraction: float = (1 - moe.top_k / moe.num_experts) ** (running * topology.engine_dp)
    return engine.weights - experts * unused_fraction


def _collective_seconds(inputs: PlanInputs, running: float) -> float:
    """Return the seconds of the sums of a decode step: two per layer over tp, and two per layer of experts over dp."""
    topology, spec, cluster = inputs.topology, inputs.spec, inputs.cluster
    message, seconds = running * spec.hidden_size * inputs.itemsize, 0.0
    tp, size = topology.engine_tp, topology.engine_size
    if tp > 1:
        moved = 2 * message * (tp - 1) / tp
        seconds += 2 * spec.num_layers * (moved / cluster.link_speed(tp) + cluster.collective_latency(tp))
    if spec.moe is not None and topology.engine_dp > 1:  # tokens are gathered for the experts, their sums scattered
        moved = message * (topology.engine_dp - 1)
        exchange = moved / cluster.link_speed(size) + cluster.collective_latency(size)
        seconds += 2 * sum(spec.moe.layers) * exchange
    return seconds

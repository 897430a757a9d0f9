"""Seconds of sampling, by hand: what a decode step reads and exchanges, and the steps of rollouts that do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from grpo_mega.planner.engine_memory import EngineMemory
from grpo_mega.planner.hardware import Assumptions, Cluster, gpu_named
from grpo_mega.planner.inputs import PlanInputs
from grpo_mega.planner.rollout_time import decode_step, rollout_seconds, rollouts_at_once
from tests.helpers.planner_cases import config_of, spec_of

GPU = gpu_named("h100-80g")
WEIGHTS, PER_TOKEN, ACTIVE = 20e9, 1e5, 1e9
BANDWIDTH = 0.85 * 3.35e12


def case(
    world: int = 1, *, kv_cache: float = 1e12, mean_length: float = 0.5, family: str = "llama", **sections: Any
) -> tuple[PlanInputs, EngineMemory]:
    sections.setdefault("sampling", {"max_tokens": 1000, "group_size": 16})
    sections.setdefault("data", {"max_prompt_tokens": 200, "prompts_per_step": 16})
    assumed = replace(Assumptions(), mean_length=mean_length)
    inputs = PlanInputs.from_config(
        config_of(train={"max_tokens_per_microbatch": 4096}, **sections), spec_of(family), Cluster(GPU, world, assumed)
    )
    return inputs, EngineMemory(WEIGHTS, kv_cache, PER_TOKEN, 0.0)


def test_a_decode_step_has_an_overhead_that_more_ranks_do_not_reduce() -> None:
    inputs, engine = case()
    step = decode_step(inputs, engine, 100.0, ACTIVE)
    # prompts of 100 tokens and completions of 0 to 1000, whose running mean is 1000 / 3
    assert step.memory == pytest.approx((WEIGHTS + 100 * (100 + 1000 / 3) * PER_TOKEN) / BANDWIDTH)
    assert step.compute == pytest.approx(100 * 2 * ACTIVE / (0.45 * 989e12))
    assert step.collectives == 0.0
    assert step.engine == pytest.approx(5e-3 - 100 * 12e-6)  # vLLM schedules while the GPU computes
    assert step.seconds == pytest.approx(step.memory + step.engine)
    assert decode_step(inputs, engine, 1000.0, ACTIVE).engine == 0.0


def test_only_vllm_on_a_gpu_hides_its_scheduling() -> None:
    for kind, gpu, seconds in (("vllm", GPU, 3.8e-3), ("sglang", GPU, 5e-3), ("vllm", gpu_named("cpu"), 5e-3)):
        inputs, engine = case(engine={"kind": kind})
        inputs = replace(inputs, cluster=replace(inputs.cluster, gpu=gpu))
        assert decode_step(inputs, engine, 100.0, ACTIVE).engine == pytest.approx(seconds)


def test_more_tensor_parallel_ranks_do_not_always_sample_faster() -> None:
    """With half of the weights per rank a step saves 2 ms; two ranks take 256 rollouts instead of 128 each."""
    seconds = {}
    for tp in (1, 2, 4, 8, 16):
        inputs, engine = case(16, engine={"tp": tp}, data={"max_prompt_tokens": 200, "prompts_per_step": 128})
        engine = replace(engine, weights=16e9 / tp, kv_bytes_per_token=PER_TOKEN / tp)
        seconds[tp] = rollout_seconds(inputs, engine, 2 * ACTIVE, ACTIVE)
    assert seconds[2] < seconds[1]
    assert seconds[16] > seconds[8]  # two nodes


def test_a_sum_between_nodes_takes_longer_than_one_inside_a_node() -> None:
    found = {}
    for tp in (8, 16):
        inputs, engine = case(16, engine={"tp": tp})
        found[tp] = decode_step(inputs, engine, 10.0, ACTIVE).collectives
        message = 10 * inputs.spec.hidden_size * inputs.itemsize
        speed, latency = (0.7 * 450e9, 15e-6) if tp == 8 else (0.7 * 50e9, 80e-6)
        by_hand = 2 * inputs.spec.num_layers * (2 * message * (tp - 1) / tp / speed + latency)
        assert found[tp] == pytest.approx(by_hand)
    assert found[16] > found[8]


def test_rollouts_that_do_not_fit_at_once_take_proportionally_more_steps() -> None:
    inputs, engine = case()
    assert rollouts_at_once(inputs, engine) == 256
    whole = rollout_seconds(inputs, engine, 0.0, ACTIVE)
    last = decode_step(inputs, engine, 128.0, ACTIVE).seconds  # half of 256 run on average
    assert whole == pytest.approx(1000 * last)
    half, small = case(kv_cache=128 * 600 * PER_TOKEN)  # 128 rollouts of 100 + 500 tokens
    assert rollouts_at_once(half, small) == pytest.approx(128)
    full, tail = decode_step(half, small, 128.0, ACTIVE).seconds, decode_step(half, small, 64.0, ACTIVE).seconds
    assert rollout_seconds(half, small, 0.0, ACTIVE) == pytest.approx(500 * full + 1000 * tail)
    almost, engine = case(kv_cache=255 * 600 * PER_TOKEN)
    assert rollout_seconds(almost, engine, 0.0, ACTIVE) < 1.05 * whole  # one rollout more is not a second round


def test_short_completions_leave_the_cache_early() -> None:
    inputs, engine = case(mean_length=0.2)
    read = decode_step(inputs, engine, 10.0, ACTIVE).memory * BANDWIDTH - WEIGHTS
    assert read == pytest.approx(10 * (0.2 * 200 + 1000 * 0.2 / 1.2) * PER_TOKEN)
    always, engine = case(mean_length=1.0)
    read = decode_step(always, engine, 10.0, ACTIVE).memory * BANDWIDTH - WEIGHTS
    assert read == pytest.approx(10 * (200 + 500) * PER_TOKEN)


def test_experts_that_no_running_rollout_is_routed_to_are_not_read() -> None:
    inputs, engine = case(family="qwen3_moe")
    moe = inputs.spec.moe
    assert moe is not None
    experts = sum(moe.layers) * 3 * inputs.spec.hidden_size * moe.expert_ffn_size * moe.num_experts * inputs.itemsize
    few, many = (decode_step(inputs, engine, n, ACTIVE).memory * BANDWIDTH for n in (1.0, 1000.0))
    unread = experts * (1 - moe.top_k / moe.num_experts)
    assert many - few == pytest.approx(unread + 999 * (100 + 1000 / 3) * PER_TOKEN)

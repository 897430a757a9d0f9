"""Seconds of a step, by hand: passes of the policy, hidden communication, and what a decode step reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_mega.cli.plan import model_of
from grpo_mega.config.load import load_config
from grpo_mega.planner.hardware import gpu_named
from grpo_mega.planner.step_time import _message_seconds

REPOSITORY = Path(__file__).resolve().parents[3]
LLAMA = REPOSITORY / "configs" / "llama-3.3-70b-8n8g-tp8pp2-vllm.yaml"
POLICY = ("algorithm.old_log_probs=policy", "algorithm.correction=null")


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of(load_config(LLAMA), gpu_named("h100-80g"))


def seconds(model: Any, *overrides: str) -> dict[str, float]:
    found: dict[str, float] = model.plan(load_config(LLAMA, overrides)).time.phases
    return found


def test_the_shipped_70b_config_takes_at_most_220_seconds(model: Any) -> None:
    plan = model.plan(load_config(LLAMA.with_name("llama-3.3-70b-8n8g-tp4pp4-vllm.yaml")))
    assert plan.fits
    assert plan.time.seconds <= 220
    changes = ["parallel.tp=4", "parallel.pp=4", "train.max_tokens_per_microbatch=5120"]
    assert model.plan(load_config(LLAMA, changes)).time.seconds == pytest.approx(plan.time.seconds)
    assert plan.time.seconds < sum(seconds(model).values()) <= 220


def test_a_pass_of_the_policy_covers_what_the_first_update_does_not(model: Any) -> None:
    reference = seconds(model)["log_probs"]  # with the log-probs of the sampler only the reference is computed
    of_policy = {n: seconds(model, *POLICY, f"train.minibatches_per_epoch={n}")["log_probs"] for n in (1, 4)}
    assert of_policy[4] == pytest.approx(reference * (1 + 3 / 4))
    assert of_policy[1] == pytest.approx(seconds(model, "train.minibatches_per_epoch=1")["log_probs"])
    in_reward = seconds(model, *POLICY, "algorithm.kl_in=reward")["log_probs"]
    assert in_reward == pytest.approx(2 * reference)


def test_messages_of_tensor_parallelism_wait_in_the_forward_pass_and_half_of_them_in_the_backward_pass(
    model: Any,
) -> None:
    inputs = model.plan(load_config(LLAMA)).inputs
    tokens = 2048 * 2560 / 4  # of one data-parallel rank; mean prompt 512, mean completion 2048
    found = _message_seconds(inputs, tokens)
    message = 40 * 8192 * 2 * tokens * 7 / 8 / (0.7 * 450e9)  # 40 layers of a pipeline rank, over NVLink
    assert found.forward == pytest.approx(4 * message)
    assert found.backward == pytest.approx(2 * message)
    rate = 64 * 989.5e12 * 0.4
    computed = 4 * tokens * model.plan(load_config(LLAMA)).time.model_flops / (3 * 2048 * 2560) / rate
    log_probs = seconds(model)["log_probs"]  # 160 rows of 8192 tokens in one schedule of two stages
    assert log_probs == pytest.approx(computed * (1 + 1 / 160) + 4 * message, rel=1e-3)


def test_overlapping_communication_is_hidden_behind_the_computation_of_a_row(model: Any) -> None:
    exposed, hidden = (seconds(model, f"parallel.overlap_grad_reduce={on}")["train"] for on in ("false", "true"))
    # 4 updates of (gradients + weights) * 3 / 4 at 35 GB/s between nodes; a row takes 0.57 s
    static = model.plan(load_config(LLAMA)).memory.ranks[1].static
    assert exposed - hidden == pytest.approx(4 * (static.gradients + static.weights) * 0.75 / 35e9, rel=0.05)


def test_a_decode_step_reads_the_cache_of_running_rollouts_at_half_of_their_way(model: Any) -> None:
    config, plan = load_config(LLAMA), model.plan(load_config(LLAMA))
    engine, topology, spec = plan.memory.engine, plan.inputs.topology, plan.inputs.spec
    assert topology.num_replicas == 8  # 256 rollouts each, which run at once
    # prompts of 512 tokens and completions of 0 to 4096: half of 512 + 4096 / 3
    read = engine.weights + 256 * 0.5 * (512 + 4096 / 3) * engine.kv_bytes_per_token
    running = 128 * spec.hidden_size * 2  # bytes of a sum: half of the rollouts run on average
    sums = 2 * spec.num_layers * (15e-6 + 2 * running * 7 / 8 / (0.7 * 450e9))
    step = read / (0.85 * 3.35e12) + sums + 5e-3 - 128 * 12e-6  # and the engine's own work that the GPU waits for
    decoding = config.sampling.max_tokens * step
    assert plan.time.phases["rollout"] == pytest.approx(decoding, rel=0.02)  # the rest computes the prompts


def test_graphs_of_a_sleeping_engine_are_copied_out_and_back_once_a_step(model: Any) -> None:
    copied = seconds(model)["offload"] - seconds(model, "engine.args={enforce_eager: true}")["offload"]
    assert copied == pytest.approx(2 * 2**30 / (55e9 * 0.8))  # 0.05 s over PCIe at 80%

"""The real vLLM inside gloo ranks on CPU. All tests share one world of two ranks; engines are opened on demand."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from grpo_mega.engines.vllm.arguments import VllmSettings, kv_cache_bytes
from grpo_mega.engines.vllm.engine import VllmEngine
from grpo_mega.engines.vllm.lifecycle import start
from grpo_mega.models.config_readers import read_spec
from grpo_mega.types import Completion, Prompt, SamplingRequest, UserError
from tests.helpers.engine_contract import (
    PROMPTS,
    SAMPLING,
    SETTINGS,
    generate,
    largest_log_prob_error,
    push,
    tokens,
)
from tests.helpers.engine_ranks import EngineRanks, RankSession
from tests.helpers.family_configs import raw_family_config
from tests.helpers.tiny_models import make_family_model, make_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen3": make_tiny_model(folder / "qwen3"),
        "qwen3-other": make_tiny_model(folder / "qwen3-other", seed=1),
        "qwen3-tied": make_tiny_model(folder / "qwen3-tied", tie=True),
        "qwen2": make_tiny_model(folder / "qwen2", family="qwen2", vocab=70),
        "llama": make_tiny_model(folder / "llama", family="llama", num_key_value_heads=1),
        "experts": make_family_model(folder / "experts", raw_family_config("qwen3_moe", moe_intermediate_size=64)),
    }


@pytest.fixture
def replicas(world: EngineRanks, models: dict[str, Path]) -> EngineRanks:
    """Two replicas of one rank each, with the weights of `qwen3`, version 0."""
    world.open(models["qwen3"], tp=1, **SETTINGS)
    world.call(push, models["qwen3"], 0)
    return world


# Functions that run on the ranks.


def probe(session: RankSession) -> dict[str, str]:
    found: dict[str, str] = session.engine.sink.probe()
    return found


def count_cached_blocks(session: RankSession, prompts: list[Prompt], sampling: SamplingRequest) -> tuple[int, int, int]:
    """Return the number of cached blocks after a call, after the next update, and when the next call samples."""
    engine = session.engine
    pool = engine._llm.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    counts = []

    def count() -> None:
        counts.append(len(pool.cached_block_hash_to_block))

    def no_rollouts(*_: object) -> Iterator[Any]:
        count()
        yield from ()

    engine.generate(prompts, sampling)
    count()
    engine.sink.begin_update()
    engine.sink.end_update(1)
    count()
    engine.generate(prompts, sampling)
    with mock.patch.object(engine, "_rollouts", no_rollouts):
        engine.generate(prompts, sampling)
    after_call, after_update, at_next_call = counts
    return after_call, after_update, at_next_call


def test_prefix_cache_is_used_and_dropped_at_each_version_and_call(replicas: EngineRanks) -> None:
    after_call, after_update, at_next_call = replicas.call(count_cached_blocks, PROMPTS[-1:], SAMPLING)[0]
    assert after_call >= 2
    assert (after_update, at_next_call) == (0, 0)


def sample_second_turn(
    session: RankSession,
) -> tuple[list[list[Completion]], list[Prompt], list[list[Completion]], int, int]:
    """Sample a second turn with and without `continues`; also return the number of cached blocks of both."""
    engine = session.engine
    first = engine.generate(PROMPTS, SAMPLING)
    prompts = [
        replace(prompt, token_ids=(*prompt.token_ids, *completion.token_ids.tolist(), 5))
        for prompt, group in zip(PROMPTS, first, strict=True)
        for completion in group
    ]
    limits = tuple(1 + i % 5 for i in range(len(prompts)))
    request = replace(SAMPLING, group_size=1, seed=9, max_tokens_each=limits, continues=True)
    pool = engine._llm.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    kept: list[int] = []
    original = engine._rollouts

    def rollouts(*arguments: Any) -> Iterator[Any]:
        kept.append(len(pool.cached_block_hash_to_block))
        yield from original(*arguments)

    with mock.patch.object(engine, "_rollouts", rollouts):
        second = engine.generate(prompts, request)
        engine.generate(prompts, replace(request, continues=False))
    return first, prompts, second, *kept


def test_a_second_turn_uses_cached_prefixes_and_each_rollout_has_its_own_token_limit(
    replicas: EngineRanks, models: dict[str, Path]
) -> None:
    _, prompts, second, kept, dropped = replicas.call(sample_second_turn)[0]
    assert (kept > 0, dropped) == (True, 0)
    lengths = [(len(group[0].token_ids), group[0].stop_reason) for group in second]
    assert all(n == 1 + i % 5 if reason == "length" else n <= 1 + i % 5 for i, (n, reason) in enumerate(lengths))
    assert largest_log_prob_error(models["qwen3"], prompts, second, 1.0) <= 2e-5
    assert replicas.call(sample_second_turn)[0][2] == second


def keeps_generators(session: RankSession) -> list[bool]:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    equal = []
    for action in (lambda: None, lambda: session.engine.generate(PROMPTS, SAMPLING)):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        action()
        equal.append(draw())
    return [a == b for a, b in zip(*equal, strict=True)]


def test_the_seed_determines_the_tokens_and_global_generators_are_restored(replicas: EngineRanks) -> None:
    first, again, other = (
        replicas.call(generate, PROMPTS, replace(SAMPLING, seed=seed))[0] for seed in (5, 5, 6)
    )  # fmt: skip
    assert first == again
    assert tokens(first) != tokens(other)
    assert replicas.call(keeps_generators)[0] == [True, True, True]


def callbacks(session: RankSession) -> tuple[list[tuple[int, int, int]], bool]:
    seen: list[tuple[int, int, int]] = []
    by_place: dict[tuple[int, int], Completion] = {}

    def on_completion(position: int, member: int, completion: Completion) -> None:
        unfinished = session.engine._llm.get_num_unfinished_requests()
        seen.append((position, member, unfinished))
        by_place[position, member] = completion

    groups = session.engine.generate(PROMPTS, SAMPLING, on_completion)
    same = all(by_place[p, m] is completion for p, group in enumerate(groups) for m, completion in enumerate(group))
    return seen, same


def test_each_rollout_is_reported_once_while_others_are_sampled(replicas: EngineRanks) -> None:
    seen, same = replicas.call(callbacks)[0]
    assert same
    assert sorted((position, member) for position, member, _ in seen) == [(p, m) for p in range(5) for m in range(8)]
    assert seen[0][2] > 20  # of 40
    assert seen[-1][2] == 0


def failing_callback(session: RankSession) -> tuple[bool, int]:
    before = session.engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(KeyError, match="reward"):
        session.engine.generate(PROMPTS, SAMPLING, mock.Mock(side_effect=KeyError("reward")))
    left = session.engine._llm.get_num_unfinished_requests()
    return session.engine.generate(PROMPTS, SAMPLING) == before, left


def test_a_failing_callback_leaves_no_request_behind(replicas: EngineRanks) -> None:
    assert replicas.call(failing_callback)[0] == (True, 0)


def test_replicas_sample_their_own_prompts(replicas: EngineRanks) -> None:
    first = replicas.call(generate, PROMPTS[:2], SAMPLING)[0]
    shards = replicas.call(generate_shard)
    assert tokens(shards[0]) == tokens(first)
    assert tokens(shards[1]) == tokens(replicas.call(generate, PROMPTS[2:], SAMPLING)[0])


def generate_shard(session: RankSession) -> list[list[Completion]]:
    return generate(session, PROMPTS[:2] if session.rank == 0 else PROMPTS[2:], SAMPLING)


def sleep_and_wake(session: RankSession, folder: Path) -> dict[str, Any]:
    engine = session.engine
    model = engine._llm.model_executor.driver_worker.worker.model_runner.model

    def state() -> tuple[int, int]:
        return engine.kv_cache_bytes, engine.weight_bytes

    described = [(name, p.shape, p.dtype) for name, p in model.named_parameters()]
    buffers = [b.clone() for b in model.buffers()]
    seen: dict[str, Any] = {"awake": state(), "before": engine.generate(PROMPTS, SAMPLING)}
    engine.sleep()
    seen["asleep"], seen["parameters"] = state(), {p.untyped_storage().nbytes() for p in model.parameters()}
    engine.wake("weights")
    seen["weights"] = state()
    assert described == [(name, p.shape, p.dtype) for name, p in model.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert not any(p.any() for p in model.parameters())
    push(session, folder, 0)
    engine.wake("kv_cache")
    seen["woken"], seen["after"] = state(), engine.generate(PROMPTS, SAMPLING)
    return seen


def test_sleep_releases_kv_cache_and_weights_and_a_sync_restores_them(
    replicas: EngineRanks, models: dict[str, Path]
) -> None:
    seen = replicas.call(sleep_and_wake, models["qwen3"])[0]
    # 48 rollouts x 3 blocks of 32 tokens, and the null block; keys and values, 2 layers, 2 heads of 32, 4 bytes.
    kv_cache = (48 * 3 + 1) * 32 * 2 * 2 * 2 * 32 * 4
    weights = seen["awake"][1]
    assert weights > 100_000
    assert seen["awake"] == seen["woken"] == (kv_cache, weights)
    assert (seen["asleep"], seen["parameters"]) == ((0, 0), {0})
    assert seen["weights"] == (0, weights)
    assert seen["after"] == seen["before"]


def test_tp_2_samples_the_tokens_of_tp_1(world: EngineRanks, models: dict[str, Path]) -> None:
    answers = []
    for tp in (1, 2):
        world.open(models["qwen3"], tp=tp, **SETTINGS)
        world.call(push, models["qwen3"], 0)
        answers.append(world.call(generate, PROMPTS, SAMPLING)[0])
    assert tokens(answers[0]) == tokens(answers[1])


@pytest.mark.parametrize(("name", "head"), [
    ("qwen3", "lm_head.weight"),
    ("qwen3-tied", "model.embed_tokens.weight"),
    ("qwen2", "lm_head.weight"),
    ("llama", "lm_head.weight"),
])  # fmt: skip
def test_each_family_at_tp_2(world: EngineRanks, models: dict[str, Path], name: str, head: str) -> None:
    """Both ranks return the log-probs of transformers, and the probe detects a stale packed head."""
    world.open(models[name], tp=2, **SETTINGS)
    world.call(push, models[name], 0)
    answers = world.call(generate, PROMPTS, SAMPLING)
    assert answers[0] == answers[1]
    assert largest_log_prob_error(models[name], PROMPTS, answers[0], 1.0) <= 2e-5
    fresh = world.call(probe)
    world.call(write_noise_to_head, head, False)
    stale = world.call(probe)
    world.call(write_noise_to_head, head, True)
    rebuilt = world.call(probe)
    # 20 tokens padded to 64, 32 rows a rank: the second rank has no row of the head, and nothing to probe.
    ranks = [0, 1] if name == "qwen2" else [0]
    for rank in ranks:
        assert fresh[rank] == rebuilt[rank] == {}
        assert stale[rank].keys() == {head}
        assert "rows differ from the plain weight" in stale[rank][head]


def write_noise_to_head(session: RankSession, head: str, end: bool) -> None:
    sink = session.engine.sink
    sink.begin_update()
    for region in sink.layout():
        hf = region.placement.hf
        if hf.name == head:
            sink.write(hf, torch.randn(hf.shape))
    if end:
        sink.end_update(1)


def rank_after_close(session: RankSession, folder: Path) -> dict[str, Any]:
    if session.engine is not None:
        session.engine.close()
    set_num_threads, environment = torch.set_num_threads, {k: os.environ.get(k) for k in ("RANK", "LOCAL_RANK")}
    torch.manual_seed(1)
    expected = float(torch.rand(()))
    torch.manual_seed(1)
    settings = VllmSettings(folder, dtype="fp32", tp=1, seed=0, args={"disable_cascade_attn": True}, **SETTINGS)
    engine = VllmEngine(settings)
    drawn = float(torch.rand(()))
    with pytest.raises(RuntimeError, match="before the weights are complete"):
        engine.generate(PROMPTS, SAMPLING)
    engine_args = engine._llm.vllm_config.model_config.disable_cascade_attn
    engine.close()
    session.engine, session.opened = None, None
    del engine
    total = torch.tensor([session.rank + 1.0])
    dist.all_reduce(total)
    return {
        "engine.args": engine_args,
        "generators": drawn == expected,
        "set_num_threads": torch.set_num_threads is set_num_threads,
        "environment": environment == {k: os.environ.get(k) for k in ("RANK", "LOCAL_RANK")},
        "default group": float(total),
    }


def mapped_shared_memory(session: RankSession) -> list[str] | None:
    """Return the segments of vLLM that this rank has mapped; None if its kernels for this processor use none."""
    if not hasattr(torch.ops._C, "init_shm_manager"):
        return None
    return [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "cpushm" in line]


def test_no_shared_memory_outlives_a_killed_job(world: EngineRanks, models: dict[str, Path]) -> None:
    world.open(models["llama"], tp=2, **SETTINGS)
    for mapped in world.call(mapped_shared_memory):
        if mapped is None:
            pytest.skip("vLLM's kernels for this processor share no memory: they do with AVX-512")
        assert len(mapped) >= 2  # its own segment and the other rank's
        assert all(name.endswith("(deleted)") for name in mapped)


def sample_shards(
    session: RankSession, shards: list[list[Prompt]], late: int | None
) -> tuple[list[list[Completion]], int]:
    """Sample each rank's prompt shard, the second with longer completions; also return the number of dummy batches.

    `late` is a rank whose callback is slow.
    """
    request = replace(SAMPLING, group_size=4, seed=session.rank, max_tokens=(8, 24)[session.rank])
    core = session.engine._llm.engine_core
    with mock.patch.object(core, "execute_dummy_batch", wraps=core.execute_dummy_batch) as dummies:
        groups = session.engine.generate(
            shards[session.rank], request, lambda *_: time.sleep(0.05 if session.rank == late else 0.0)
        )
    return groups, dummies.call_count


def sleep_and_wake_all(session: RankSession, folder: Path) -> None:
    session.engine.sleep()
    session.engine.wake("weights")
    push(session, folder, 0)
    session.engine.wake("kv_cache")


@pytest.mark.parametrize("ep", [pytest.param(1, marks=pytest.mark.long), 2])
def test_data_parallel_ranks_share_experts_and_step_together_for_any_prompt_shards(
    world: EngineRanks, models: dict[str, Path], ep: int
) -> None:
    """With ep=1 each expert is split over both ranks."""
    world.open(models["experts"], tp=1, dp=2, ep=ep, **SETTINGS)
    world.call(push, models["experts"], 0)
    uneven, one_sided = [PROMPTS[:4], PROMPTS[4:]], [PROMPTS[:2], []]
    answers = world.call(sample_shards, uneven, None)
    alone = world.call(sample_shards, one_sided, None)
    for shard, (groups, _) in zip([*uneven, *one_sided], [*answers, *alone], strict=True):
        assert largest_log_prob_error(models["experts"], shard, groups, 1.0) <= 2e-5
    longest = [[max(len(c.token_ids) for group in found for c in group) if found else 0 for found, _ in two]
               for two in (answers, alone)]  # fmt: skip
    assert longest[0][1] > 8 >= longest[0][0]
    assert [dummies for _, dummies in answers] == [longest[0][1] - longest[0][0], 0]
    assert [dummies for _, dummies in alone] == [0, longest[1][0]]
    world.call(sleep_and_wake_all, models["experts"])
    for late in (0, 1):
        assert world.call(sample_shards, uneven, late) == answers


def test_an_engine_receives_engine_args_and_restores_its_process_on_close(
    world: EngineRanks, models: dict[str, Path]
) -> None:
    for seen in world.call(rank_after_close, models["qwen3"]):
        assert seen == {
            "engine.args": True, "generators": True, "set_num_threads": True, "environment": True, "default group": 3.0,
        }  # fmt: skip


def test_missing_vllm_says_what_to_install(models: dict[str, Path]) -> None:
    settings = VllmSettings(models["qwen3"], "fp32", 1, 96, 8, None, 0)
    with (
        mock.patch.dict(os.environ),
        mock.patch.dict(sys.modules, {"vllm": None}),
        mock.patch.object(dist, "get_world_size", return_value=1),
        pytest.raises(ImportError, match=r"engine\.kind=vllm needs vLLM: pip install 'grpo_mega\[vllm\]'"),
    ):
        start(settings, read_spec(models["qwen3"]))


def test_a_world_size_that_engine_tp_does_not_divide_is_rejected(models: dict[str, Path]) -> None:
    settings = VllmSettings(models["qwen3"], "fp32", 2, 96, 8, None, 0)
    with (
        mock.patch.object(dist, "get_world_size", return_value=3),
        pytest.raises(UserError, match=r"engine\.tp=2 does not divide the 3 ranks"),
    ):
        start(settings, read_spec(models["qwen3"]))


def test_kv_cache_tokens_bounds_the_bytes_and_must_hold_a_rollout(models: dict[str, Path]) -> None:
    spec = read_spec(models["qwen3"])
    per_block = 32 * 2 * 2 * 2 * 32  # tokens, keys and values, layers, KV heads, head_dim
    settings = VllmSettings(models["qwen3"], "bf16", 1, 96, 8, 320, 0)
    assert kv_cache_bytes(settings, spec) == 11 * per_block * 2
    assert kv_cache_bytes(replace(settings, tp=2, dtype="fp32"), spec) == 11 * per_block // 2 * 4
    with pytest.raises(UserError, match=r"engine\.kv_cache_tokens=95 does not hold.*96 tokens; use at least 96"):
        kv_cache_bytes(replace(settings, kv_cache_tokens=95), spec)


def test_a_head_size_without_cpu_kernel_is_rejected_before_the_engine_starts(
    world: EngineRanks, tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "small-heads", head_dim=16)
    assert all("head_dim=16" in message and "32, 64" in message for message in world.call(start_error, folder))


def start_error(session: RankSession, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        VllmEngine(VllmSettings(folder, dtype="fp32", tp=1, seed=0, **SETTINGS))
    return str(caught.value)

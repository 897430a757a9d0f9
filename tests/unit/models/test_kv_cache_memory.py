"""Sizes of the KV cache: computed by hand, and equal in the planner and in both engine adapters."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.config.schema import Config
from grpo_mega.engines.sglang.arguments import cached_tokens
from grpo_mega.engines.vllm.arguments import VllmSettings, kv_cache_bytes
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.models.kv_cache_memory import KvCacheSize, kv_bytes_per_token
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import UserError
from tests.helpers.planner_cases import config_of, memory_of, spec_of
from tests.helpers.random_families import random_config

SEEDS = range(200)


def random_case(seed: int) -> tuple[Config, ModelSpec]:
    """Return a random engine and a random model: both engines, tp 1 to 8, both types, latent attention or not."""
    rng = random.Random(seed)
    family = rng.choice(("llama", "qwen3", "deepseek_v2", "deepseek_v3"))
    config = config_of(
        engine={
            "kind": rng.choice(("vllm", "sglang")),
            "tp": rng.choice((1, 2, 4, 8)),
            "max_num_seqs": rng.randint(1, 64),
            "kv_cache_tokens": rng.choice((None, rng.randint(16, 400), rng.randint(16, 4096))),
        },
        precision={"dtype": rng.choice(("fp32", "bf16"))},
        data={"max_prompt_tokens": rng.randint(8, 300)},
        sampling={"max_tokens": rng.randint(8, 300)},
        evaluation={"max_tokens": rng.choice((None, rng.randint(8, 900)))},
        train={"max_tokens_per_microbatch": 1024},
    )
    return config, spec_from_config(random_config(rng, family), "config.json")


def engine_bytes(config: Config, spec: ModelSpec) -> int:
    """Return the cache bytes that the engine adapter requests on one rank, from its own settings."""
    sizes = {"max_model_len": config.longest_rollout, "max_num_seqs": config.engine.max_num_seqs}
    if config.engine.kind == "vllm":
        settings: Any = VllmSettings(
            config_dir=Path("unused"),
            dtype=config.precision.dtype,
            tp=config.engine.tp,
            kv_cache_tokens=config.engine.kv_cache_tokens,
            seed=0,
            **sizes,
        )
        return kv_cache_bytes(settings, spec)
    tokens = cached_tokens(config.engine.kv_cache_tokens, **sizes)
    itemsize = 4 if config.precision.dtype == "fp32" else 2
    return (tokens + 1) * kv_bytes_per_token(spec, config.engine.tp, itemsize)  # SGLang's pools hold one page more


def value_or_error(compute: Any) -> float | str:
    try:
        return float(compute())
    except UserError as error:
        return str(error)


def test_planner_and_engine_agree_on_random_configs() -> None:
    outcomes = []
    for seed in SEEDS:
        config, spec = random_case(seed)
        planned = value_or_error(lambda c=config, s=spec: memory_of(c, s, 8, "cpu").engine.kv_cache)
        assert planned == value_or_error(lambda c=config, s=spec: engine_bytes(c, s)), f"seed {seed}"
        outcomes.append(planned)
    assert sum(isinstance(found, str) for found in outcomes) > 20, "some caches are too small"
    assert sum(isinstance(found, float) for found in outcomes) > 100


def test_a_vllm_cache_has_whole_blocks_and_one_null_block() -> None:
    spec = spec_of()  # 2 layers of 2 key heads of 16
    size = KvCacheSize("vllm", max_model_len=97, max_num_seqs=3, max_tokens=None)
    assert (size.blocks_per_rollout, size.tokens_per_rollout, size.num_blocks) == (4, 128, 12)
    assert size.num_bytes(spec, tp=1, itemsize=2) == 13 * 32 * (2 * 2 * 2 * 16 * 2)


def test_an_sglang_cache_reserves_eight_positions_for_each_rollout() -> None:
    size = KvCacheSize("sglang", max_model_len=96, max_num_seqs=48, max_tokens=None)
    assert (size.tokens_per_rollout, size.num_tokens) == (104, 48 * 104)


@pytest.mark.parametrize(("kind", "too_few", "least"), [("vllm", 95, 96), ("sglang", 103, 104)])
def test_a_cache_below_one_rollout_is_rejected_with_the_least_size(kind: Any, too_few: int, least: int) -> None:
    KvCacheSize(kind, 96, 8, least).check()
    with pytest.raises(UserError, match=rf"engine\.kv_cache_tokens={too_few} .* 96 tokens.*; use at least {least}"):
        KvCacheSize(kind, 96, 8, too_few).check()


def test_vllm_computes_a_whole_prompt_in_one_step() -> None:
    sizes = [KvCacheSize(kind, 10_000, 8, None).batched_tokens for kind in ("vllm", "sglang")]
    assert sizes == [10_000, 8192]


def test_the_cache_of_latent_attention_is_the_same_on_every_rank() -> None:
    spec = spec_of("deepseek_v3")
    assert [kv_bytes_per_token(spec, tp, 2) for tp in (1, 4)] == [2 * (24 + 8) * 2] * 2
    assert [kv_bytes_per_token(spec_of(), tp, 2) for tp in (1, 2, 4)] == [2 * 2 * 2 * 16 * 2, 128, 128]

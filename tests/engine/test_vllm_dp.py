"""vLLM replicas whose data-parallel ranks share experts, synchronized from a Megatron policy.

Each copy has its own prompts, another number of them, or none. All in fp32 on tiny random models.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.types import Prompt, Rollout, SamplingRequest
from tests.helpers.engine_ranks import EngineRanks, engine_ranks
from tests.helpers.family_configs import raw_family_config
from tests.helpers.synced_engine import build, expected_digest, largest_mismatch, perturb, prepare_policy, push, sample
from tests.helpers.tiny_models import make_family_model

pytestmark = pytest.mark.long

SETTINGS: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 8, "kv_cache_tokens": None}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # rows that the kernel can split over four ranks
    "qwen3_moe": ("qwen3_moe", {"moe_intermediate_size": 128}),
    # with shared experts, which a replica of several data-parallel ranks does not split
    "deepseek_v3": ("deepseek_v3", LATENT | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
    "glm4_moe": ("glm4_moe", {}),
    "mixtral": ("mixtral", {"head_dim": 32}),
    # exactly one of the ranks that share an expert adds its bias
    "gpt_oss": ("gpt_oss", {"rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "intermediate_size": 128}),
}
TWO_ENGINES = {"tp": 2, "dp": 2, "ep": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name, (family, changes) in MODELS.items():
        config = raw_family_config(family, **changes)
        if family == "gpt_oss":
            rope = config["rope_parameters"]  # 16 x 4 positions: fewer than the engine's
            config["rope_parameters"] = rope | {"original_max_position_embeddings": 32}
        found[name] = make_family_model(root / name, config)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRanks]:
    with engine_ranks(8, tmp_path_factory.mktemp("ranks"), prepare_policy) as ranks:
        yield ranks


def prompts(*lengths: int) -> list[Prompt]:
    return [Prompt(i, "", tuple(2 + (3 * i + j * j) % 18 for j in range(n)), "") for i, n in enumerate(lengths)]


# Prompt shards of two replicas: one shard is empty, and one is much larger than the other shard of its replica.
SHARDS = (prompts(6, 1, 9), [], prompts(70, 3, 3, 12, 2), prompts(5))
LIMITS = ((3, 40, 8), (), (20, 4, 9, 15, 7), (60,))
SAMPLING = SamplingRequest(group_size=3, temperature=1.0, max_tokens=64, seed=3)


def sampled(world: EngineRanks) -> list[list[Rollout]]:
    """Sample and return the rollouts of each shard; the ranks of one shard return the same."""
    found: list[list[Rollout]] = world.call(sample, SHARDS, SAMPLING, LIMITS)
    assert found[0::2] == found[1::2]
    assert [len(rollouts) for rollouts in found[0::2]] == [3 * len(shard) for shard in SHARDS]
    return found[0::2]


@pytest.mark.parametrize(
    ("name", "axes", "engine"),
    [
        pytest.param("qwen3_moe", {"tp": 2, "ep": 2, "sequence_parallel": True}, TWO_ENGINES, id="tp2ep2"),
        pytest.param("qwen3_moe", {"pp": 2, "ep": 4}, TWO_ENGINES, id="pp2ep4"),
        pytest.param("qwen3_moe", {"ep": 2}, {"tp": 2, "dp": 2, "ep": 1}, id="ep2-to-split-experts"),
        pytest.param("qwen3_moe", {"ep": 2}, {"tp": 2, "dp": 4, "ep": 8}, id="ep2-to-one-engine-of-eight"),
        pytest.param("deepseek_v3", {"ep": 2}, TWO_ENGINES, id="latent-ep2"),
        pytest.param("glm4_moe", {"ep": 2}, TWO_ENGINES, id="glm-ep2"),
        pytest.param("mixtral", {"ep": 2}, TWO_ENGINES, id="mixtral-ep2"),
        pytest.param("gpt_oss", {"ep": 2}, TWO_ENGINES, id="sinks-ep2"),
        pytest.param("gpt_oss", {"ep": 2}, {"tp": 2, "dp": 2, "ep": 1}, id="sinks-ep2-to-split-experts"),
    ],
)
def test_engines_of_several_data_parallel_ranks_follow_the_policy(
    world: EngineRanks,
    models: dict[str, Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    name: str,
    axes: dict[str, Any],
    engine: dict[str, int],
) -> None:
    world.open(models[name], **engine, **SETTINGS)
    world.call(build, Path(shutil.copytree(models[name], tmp_path / "weights")), axes, engine)
    first = world.call(push, 0)
    sampled(world)
    worst = [world.call(largest_mismatch)[0]]
    assert worst[0] <= 1e-4
    world.call(perturb, 1)
    assert world.call(largest_mismatch)[0] > 1e-3  # the tolerance detects weights that did not change
    second = world.call(push, 1)
    rollouts = sampled(world)
    worst.append(world.call(largest_mismatch)[0])
    assert worst[1] <= 1e-4
    record_property("largest_mismatch", max(worst))
    record_property("received_bytes", [report.received_bytes for report in second])
    assert {r.completion.policy_version for shard in rollouts for r in shard} == {1}
    assert {report.policy_digest for report in first} == {expected_digest(models[name])}
    assert {report.policy_digest for report in second} == {expected_digest(models[name], 1)}

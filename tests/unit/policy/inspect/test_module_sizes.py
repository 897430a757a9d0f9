"""Sizes counted from one layer of each kind are those of the real modules of whole models, in every layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.config.schema import Config
from grpo_mega.models.config_readers import read_spec, spec_from_config
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.planner.plan import total_parameters
from grpo_mega.planner.static_memory import chunk_parts, model_chunks
from grpo_mega.policy.inspect.module_sizes import meta_models, module_sizes
from grpo_mega.policy.module_choice import LOCAL_ON_META
from tests.helpers.family_configs import FAMILY_CONFIGS, raw_family_config

MODELS = Path(__file__).resolve().parents[4] / "configs" / "models"


def config_of(**parallel: Any) -> Config:
    raw = {
        "model": {"path": "unused"},
        "parallel": parallel,
        "data": {"train": "unused"},
        "reward": {"terms": [{"name": "exact"}]},
        "train": {"steps": 1},
    }
    return Config.model_validate(raw)


def spec_of(family: str, **changes: Any) -> ModelSpec:
    return spec_from_config(raw_family_config(family, **changes), "config.json")


@pytest.mark.parametrize(
    ("spec", "parallel", "world"),
    [
        (spec_of("llama", num_hidden_layers=4), {"tp": 2, "pp": 2, "sequence_parallel": True}, 8),
        (spec_of("qwen3", num_hidden_layers=4, tie_word_embeddings=True), {"pp": 2, "vpp": 2}, 2),
        (spec_of("qwen3_moe"), {"tp": 2, "ep": 4, "sequence_parallel": True}, 4),
        (spec_of("deepseek_v3", num_hidden_layers=4), {"pp": 2, "ep": 2}, 4),
        (spec_of("deepseek_v3", num_hidden_layers=3), {"pp": 2, "num_layers_first_stage": 1, "ep": 2, "etp": 2,
                                                       "tp": 2, "sequence_parallel": True}, 8),
        (spec_of("deepseek_v2", num_hidden_layers=4), {"tp": 2, "ep": 2, "sequence_parallel": True}, 4),
        (spec_of("mixtral"), {"tp": 2, "ep": 2, "sequence_parallel": True}, 2),
        (spec_of("glm4_moe", num_hidden_layers=4), {"pp": 2, "ep": 2}, 4),
        (spec_of("gpt_oss"), {"tp": 2, "ep": 4, "sequence_parallel": True}, 4),
    ],
    ids=["llama", "qwen3-tied-vpp", "qwen3_moe", "deepseek_v3", "deepseek_v3-etp", "deepseek_v2", "mixtral", "glm4_moe",
         "gpt_oss"],
)  # fmt: skip
def test_each_rank_s_parameters_are_those_of_its_real_modules(
    spec: ModelSpec, parallel: dict[str, Any], world: int
) -> None:
    config = config_of(**parallel)
    axes = config.parallel
    sizes = module_sizes(spec, tp=axes.tp, ep=axes.ep, etp=axes.etp)
    for pp_rank, chunks in enumerate(model_chunks(spec, config, "config.json")):
        parts = [part for chunk in chunks for part in chunk_parts(chunk, spec.tie_embeddings)]
        counted = [p.numel for part in parts for p in getattr(sizes, part)]
        models = meta_models(spec, axes, world, pp_rank * (world // axes.pp), LOCAL_ON_META)
        real = [p.numel() for model in models for p in model.parameters()]
        assert sorted(counted) == sorted(real), f"pipeline rank {pp_rank}"


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_the_total_is_that_of_the_checkpoint_s_tensors(family: str) -> None:
    spec = spec_of(family)
    biases = sum(math.prod(s) for name, s in hf_shapes(spec).items() if name.endswith("e_score_correction_bias"))
    whole = module_sizes(spec, tp=1, ep=1, etp=1)
    counted = total_parameters(config_of(), spec, whole, "config.json")
    assert counted == sum(math.prod(s) for s in hf_shapes(spec).values()) - biases


def test_a_tied_head_counts_once_in_the_total() -> None:
    spec = spec_of("qwen3", tie_word_embeddings=True)
    whole = module_sizes(spec, tp=1, ep=1, etp=1)
    totals = {total_parameters(config_of(**keys), spec, whole, "config.json") for keys in ({}, {"pp": 2})}
    assert totals == {sum(math.prod(s) for s in hf_shapes(spec).values())}


def test_deepseek_v3_has_671_026_404_352_parameters() -> None:
    spec = read_spec(MODELS / "DeepSeek-V3")
    whole = module_sizes(spec, tp=1, ep=1, etp=1)
    assert total_parameters(config_of(), spec, whole, "config.json") == 671_026_404_352


def test_counting_leaves_no_process_group_behind() -> None:
    import torch.distributed as dist

    module_sizes(spec_of("llama"), tp=2, ep=1, etp=1)
    assert not dist.is_initialized()


def test_expert_parameters_are_marked() -> None:
    sizes = module_sizes(spec_of("qwen3_moe"), tp=1, ep=2, etp=1)
    marked = {p.name for p in sizes.moe_layer if p.is_expert}
    assert marked == {p.name for p in sizes.moe_layer if "local_experts" in p.name}
    assert ParallelConfig().ep == 1
    assert len(marked) == 8

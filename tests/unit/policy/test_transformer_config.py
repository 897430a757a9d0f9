"""Fields of Megatron's config that depend on the modules and on the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from grpo_mega.config.policy_sections import ParallelConfig, PrecisionConfig
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.policy.transformer_config import transformer_config, transformer_fields
from tests.helpers.family_configs import FAMILY_CONFIGS, raw_family_config
from tests.helpers.module_choices import LOCAL_ON_CPU, LOCAL_ON_CUDA, TRANSFORMER_ENGINE

from megatron.core.models.common.embeddings import rope_utils  # isort: skip - after the import of transformer_config
from megatron.core.tensor_parallel import layers  # isort: skip
from megatron.core.transformer.moe import moe_utils  # isort: skip

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
PLAIN = {"rope_type": "default", "rope_theta": 1000.0}
BF16 = PrecisionConfig(dtype="bf16")


@pytest.mark.parametrize(
    ("family", "rope", "fused"),
    [
        ("deepseek_v3", YARN, True),
        ("deepseek_v3", PLAIN, False),  # Megatron: "apply_rope_fusion for MLA only works with YARN RoPE"
        ("qwen3", PLAIN, True),
        ("qwen3", YARN, False),  # the kernel for packed rows does not scale cosine and sine
    ],
)
def test_rotary_embeddings_are_fused_where_megatron_has_a_kernel(
    family: str, rope: dict[str, Any], fused: bool
) -> None:
    spec = spec_from_config(raw_family_config(family, rope_parameters=rope), "config.json")
    for modules in (LOCAL_ON_CPU, LOCAL_ON_CUDA, TRANSFORMER_ENGINE):
        fields = transformer_fields(spec, ParallelConfig(), BF16, modules)
        assert fields["apply_rope_fusion"] is (modules.transformer_engine and fused)


PERMUTATIONS = ("permute", "permute_with_probs", "sort_chunks_by_index", "sort_chunks_by_index_with_probs", "unpermute")


def test_latent_attention_without_yarn_has_a_config_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PERMUTATIONS:  # Megatron's config checks that Transformer Engine has these kernels
        monkeypatch.setattr(moe_utils, f"fused_{name}", object())
    spec = spec_from_config(raw_family_config("deepseek_v3", rope_parameters=PLAIN), "config.json")
    config = transformer_config(spec, ParallelConfig(), BF16, TRANSFORMER_ENGINE)
    assert (config.rope_type, config.apply_rope_fusion) == ("rope", False)


def test_what_only_transformer_engine_has_is_off_with_local_modules() -> None:
    spec = spec_from_config(raw_family_config("qwen3_moe"), "config.json")
    names = ("transformer_impl", "moe_grouped_gemm", "apply_rope_fusion")
    found = {
        modules: [transformer_fields(spec, ParallelConfig(), BF16, modules)[name] for name in names]
        for modules in (LOCAL_ON_CPU, LOCAL_ON_CUDA, TRANSFORMER_ENGINE)
    }
    assert found[LOCAL_ON_CPU] == found[LOCAL_ON_CUDA] == ["local", False, False]
    assert found[TRANSFORMER_ENGINE] == ["transformer_engine", True, True]


KERNELS = ("gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion", "moe_permute_fusion")


@pytest.mark.parametrize(
    ("family", "fused"),
    [
        ("llama", [True, True, True, None]),
        ("qwen3_moe", [True, True, True, True]),
        ("deepseek_v3", [True, True, True, True]),
        ("gpt_oss", [True, False, True, True]),  # its clamped gate has no kernel
    ],
)
def test_fused_kernels_are_on_with_transformer_engine_only(family: str, fused: list[bool | None]) -> None:
    spec = spec_from_config(raw_family_config(family), "config.json")
    found = transformer_fields(spec, ParallelConfig(), BF16, TRANSFORMER_ENGINE)
    assert [found.get(name) for name in KERNELS] == fused
    assert (found["masked_softmax_fusion"], found["persist_layer_norm"]) == (False, False)
    for modules in (LOCAL_ON_CPU, LOCAL_ON_CUDA):
        fields = transformer_fields(spec, ParallelConfig(), BF16, modules)
        assert not any(fields.get(name) for name in KERNELS)


def is_fusion(name: str) -> bool:
    return any(part in name for part in ("fusion", "fused", "fuser", "persist"))


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_local_modules_use_no_kernel_of_transformer_engine_or_apex(family: str) -> None:
    """Here neither is installed, so Megatron has none of these kernels, on no device."""
    assert rope_utils.fused_apply_rotary_pos_emb_thd is None
    assert moe_utils.fused_permute is None
    assert layers._grad_accum_fusion_available is False
    spec = spec_from_config(raw_family_config(family), "config.json")
    for modules in (LOCAL_ON_CPU, LOCAL_ON_CUDA):
        config = transformer_config(spec, ParallelConfig(), BF16, modules)
        switches = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if is_fusion(f.name)}
        assert {"gradient_accumulation_fusion", "bias_activation_fusion", "cross_entropy_loss_fusion"} <= set(switches)
        assert {name for name, value in switches.items() if value is True} == set()


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_transformer_engine_switches_on_only_kernels_that_were_looked_for(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """test_transformer_engine_modules.py finds those of Transformer Engine in its release; torch compiles others."""
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", object())
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    for name in PERMUTATIONS:
        monkeypatch.setattr(moe_utils, f"fused_{name}", object())
    spec = spec_from_config(raw_family_config(family), "config.json")
    config = transformer_config(spec, ParallelConfig(), BF16, TRANSFORMER_ENGINE)
    on = {f.name for f in dataclasses.fields(config) if is_fusion(f.name) and getattr(config, f.name) is True}
    assert on <= {"apply_rope_fusion", *KERNELS}


@pytest.mark.parametrize(
    ("family", "modules", "recomputed"),
    [
        ("llama", LOCAL_ON_CPU, ["core_attn"]),
        ("llama", LOCAL_ON_CUDA, None),
        ("llama", TRANSFORMER_ENGINE, None),
        ("deepseek_v3", TRANSFORMER_ENGINE, ["mla_up_proj"]),
    ],
)
def test_selective_recomputation_leaves_out_attention_that_recomputes_itself(
    family: str, modules: Any, recomputed: list[str] | None
) -> None:
    spec = spec_from_config(raw_family_config(family), "config.json")
    fields = transformer_fields(spec, ParallelConfig(recompute="selective"), BF16, modules)
    assert fields.get("recompute_modules") == recomputed

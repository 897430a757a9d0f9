"""Fields of Megatron's config that depend on the modules and on the device."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_mega.config.policy_sections import ParallelConfig, PrecisionConfig
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.policy.transformer_config import transformer_config, transformer_fields
from tests.helpers.family_configs import raw_family_config
from tests.helpers.module_choices import LOCAL_ON_CPU, LOCAL_ON_CUDA, TRANSFORMER_ENGINE

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


def test_latent_attention_without_yarn_has_a_config_on_cuda() -> None:
    spec = spec_from_config(raw_family_config("deepseek_v3", rope_parameters=PLAIN), "config.json")
    config = transformer_config(spec, ParallelConfig(), BF16, TRANSFORMER_ENGINE)
    assert (config.rope_type, config.apply_rope_fusion) == ("rope", False)


def test_what_only_transformer_engine_has_is_off_with_local_modules() -> None:
    spec = spec_from_config(raw_family_config("qwen3_moe"), "config.json")
    names = ("transformer_impl", "persist_layer_norm", "moe_grouped_gemm", "apply_rope_fusion")
    found = {
        modules: [transformer_fields(spec, ParallelConfig(), BF16, modules)[name] for name in names]
        for modules in (LOCAL_ON_CPU, LOCAL_ON_CUDA, TRANSFORMER_ENGINE)
    }
    assert found[LOCAL_ON_CPU] == found[LOCAL_ON_CUDA] == ["local", False, False, False]
    assert found[TRANSFORMER_ENGINE] == ["transformer_engine", True, True, True]

"""Fields of Megatron's config that depend on the device, with a device that only seems to have CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_mega.config.policy_sections import ParallelConfig, PrecisionConfig
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.policy.transformer_config import transformer_config, transformer_fields
from tests.helpers.family_configs import raw_family_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
PLAIN = {"rope_type": "default", "rope_theta": 1000.0}


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
    monkeypatch: pytest.MonkeyPatch, family: str, rope: dict[str, Any], fused: bool
) -> None:
    spec = spec_from_config(raw_family_config(family, rope_parameters=rope), "config.json")
    for on_cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=on_cuda: value)
        fields = transformer_fields(spec, ParallelConfig(), PrecisionConfig(dtype="bf16"))
        assert fields["apply_rope_fusion"] is (on_cuda and fused)


def test_latent_attention_without_yarn_has_a_config_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec = spec_from_config(raw_family_config("deepseek_v3", rope_parameters=PLAIN), "config.json")
    config = transformer_config(spec, ParallelConfig(), PrecisionConfig(dtype="bf16"))
    assert (config.rope_type, config.apply_rope_fusion) == ("rope", False)

"""Rotary frequencies of every kind and family are those of transformers; Megatron's modules turn by them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.policy.modules.rotary import megatron_mscale, rotary_frequencies, set_frequencies
from tests.helpers.family_configs import raw_family_config

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 5000.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {"rope_type": "default", "rope_theta": 500000.0}),
    "linear": ("llama", {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        },
    ),
    "yarn": ("qwen2", YARN),
    "yarn-betas": ("qwen2", YARN | {"beta_fast": 4.0, "beta_slow": 2.0}),
    "yarn-factor": ("qwen2", YARN | {"attention_factor": 1.7}),
    "yarn-exact-bounds": ("gpt_oss", YARN | {"truncate": False, "beta_fast": 16.0}),
    "yarn-latent": ("deepseek_v3", YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}),
    "half": ("glm4_moe", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
}


def transformers_rotary(raw: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Return (frequencies, factor of cosine and sine) of transformers."""
    from transformers import AutoConfig, AutoModel

    settings = {name: value for name, value in raw.items() if name not in ("model_type", "architectures")}
    with torch.device("meta"):
        skeleton = AutoModel.from_config(AutoConfig.for_model(raw["model_type"], **settings))
    rotary = type(skeleton.rotary_emb)(skeleton.config)  # on this device
    return rotary.inv_freq, float(rotary.attention_scaling)


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    family, rope = KINDS[kind]
    raw = raw_family_config(family, rope_parameters=rope)
    spec = spec_from_config(raw, "config.json")
    wanted, factor = transformers_rotary(raw)
    torch.testing.assert_close(rotary_frequencies(spec), wanted.float(), rtol=1e-6, atol=0)
    assert (1.0 if spec.rope is None else spec.rope.attention_factor) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("kind", ["yarn", "yarn-factor", "yarn-latent"])
def test_megatron_receives_the_setting_that_gives_the_attention_factor(kind: str) -> None:
    family, rope = KINDS[kind]
    spec = spec_from_config(raw_family_config(family, rope_parameters=rope), "config.json")
    assert spec.rope is not None
    found = 0.1 * megatron_mscale(spec) * math.log(spec.rope.factor) + 1.0
    assert found == pytest.approx(spec.rope.attention_factor, rel=1e-12)


def test_a_megatron_module_recomputes_its_values_after_its_frequencies_change() -> None:
    cleared = []
    rotary = SimpleNamespace(inv_freq=torch.zeros(2), forward=SimpleNamespace(cache_clear=lambda: cleared.append(True)))
    spec = spec_from_config(raw_family_config("llama", rope_parameters=KINDS["linear"][1]), "config.json")
    set_frequencies(rotary, spec)
    assert torch.equal(rotary.inv_freq, rotary_frequencies(spec))
    assert cleared == [True]

"""Settings that both engines read from the same keys of the config."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.engines.replica_settings import ReplicaSettings
from grpo_mega.engines.sglang.arguments import SglangSettings
from grpo_mega.engines.vllm.arguments import VllmSettings


@pytest.mark.parametrize("settings_class", [VllmSettings, SglangSettings])
def test_engines_read_the_common_settings_from_the_same_keys(
    settings_class: type[VllmSettings] | type[SglangSettings],
) -> None:
    sizes = ["engine.max_num_seqs=9", "engine.kv_cache_tokens=null", "engine.memory_share=0.7"]
    overrides = [*sizes, "run.seed=11", "precision.dtype=fp32"]
    config = load_config(Path("configs/quickstart.yaml"), overrides)
    found = settings_class.from_config(config, Path("model"))
    common = {each.name: getattr(found, each.name) for each in fields(ReplicaSettings)}
    assert common == {
        "config_dir": Path("model"),
        "dtype": "fp32",
        "tp": config.engine.tp,
        "max_model_len": config.longest_rollout,
        "max_num_seqs": 9,
        "kv_cache_tokens": None,
        "memory_share": 0.7,
        "seed": 11,
        "ep": 1,
        "return_experts": False,
        "args": {},
    }

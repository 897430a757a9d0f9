"""Megatron's config of the optimizer: what each key of the config sets, and the part that stays on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_mega.config.policy_sections import OptimizerConfig, PrecisionConfig
from grpo_mega.policy.optimizer_config import host_optimizer_fields, megatron_optimizer, moment_fields, optimizer_config

FP32, BF16 = PrecisionConfig(dtype="fp32"), PrecisionConfig(dtype="bf16")


@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        ({"lr": 1e-3}, {"lr": 1e-3}),
        ({"beta1": 0.5, "beta2": 0.75}, {"adam_beta1": 0.5, "adam_beta2": 0.75}),
        ({"eps": 1e-5, "weight_decay": 0.25}, {"adam_eps": 1e-5, "weight_decay": 0.25}),
        ({"clip_grad": 2.0}, {"clip_grad": 2.0, "optimizer": "adam", "optimizer_cpu_offload": False}),
    ],
    ids=str,
)
def test_each_key_sets_its_field_of_megatron(keys: dict[str, Any], fields: dict[str, Any]) -> None:
    found = optimizer_config(OptimizerConfig(**keys), FP32, {})
    assert {name: getattr(found, name) for name in fields} == fields


def test_the_number_format_and_passed_fields_reach_megatron() -> None:
    assert optimizer_config(OptimizerConfig(), BF16, {}).bf16
    assert not optimizer_config(OptimizerConfig(), FP32, {}).bf16
    assert optimizer_config(OptimizerConfig(), FP32, {"barrier_with_L1_time": True}).barrier_with_L1_time


def test_a_fraction_of_the_optimizer_stays_on_the_host() -> None:
    assert host_optimizer_fields(OptimizerConfig()) == {}
    settings = host_optimizer_fields(OptimizerConfig(host_fraction=0.5))
    assert settings["optimizer_offload_fraction"] == 0.5
    assert settings.keys() <= megatron_optimizer.OptimizerConfig.__dataclass_fields__.keys()


def test_moments_in_bf16_keep_master_weights_in_float32() -> None:
    assert moment_fields(OptimizerConfig()) == {}
    fields = moment_fields(OptimizerConfig(moments="bf16"))
    assert (fields["exp_avg_dtype"], fields["exp_avg_sq_dtype"]) == (torch.bfloat16, torch.bfloat16)
    declared = megatron_optimizer.OptimizerConfig.__dataclass_fields__
    assert fields.keys() <= declared.keys()
    assert declared["main_params_dtype"].default == torch.float32
    assert fields["store_param_remainders"] is False

"""Megatron's config of the optimizer: Adam, number formats, and the fraction of its state on the host.

Muon replaces the Adam that Megatron builds from it (muon.py).
`optimizer.host_fraction` keeps master weights and moments in host memory and updates them there. What moves to the host
between the phases of a step is in phase_offload.py instead.
Asserted by tests/unit/policy/test_optimizer_config.py.
"""

from __future__ import annotations

from typing import Any

import torch

from grpo_mega.config.policy_sections import OptimizerConfig, PrecisionConfig
from grpo_mega.policy import fp8
from grpo_mega.policy.megatron_patches import cpu

cpu.prepare_import()

import megatron.core.optimizer as megatron_optimizer  # noqa: E402 - only after prepare_import

from grpo_mega.policy.transformer_config import DTYPES  # noqa: E402


def optimizer_config(
    optimizer: OptimizerConfig, precision: PrecisionConfig, passed: dict[str, Any]
) -> megatron_optimizer.OptimizerConfig:
    """Return Megatron's description of the optimizer.

    Args:
        optimizer: section of the config.
        precision: section of the config.
        passed: checked fields of `parallel.megatron` (megatron_arguments.py).
    """
    return megatron_optimizer.OptimizerConfig(**(optimizer_fields(optimizer, precision) | passed))


def optimizer_fields(optimizer: OptimizerConfig, precision: PrecisionConfig) -> dict[str, Any]:
    """Return the fields of Megatron's OptimizerConfig that the program sets."""
    dtype = DTYPES[precision.dtype]
    return {
        "optimizer": "adam",
        "lr": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_eps": optimizer.eps,
        "clip_grad": optimizer.clip_grad,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_distributed_optimizer": True,
        **fp8.optimizer_fields(precision),
        **host_optimizer_fields(optimizer),
        **moment_fields(optimizer),
    }


def host_optimizer_fields(optimizer: OptimizerConfig) -> dict[str, Any]:
    """Return the fields that keep a fraction of the master weights and moments on the host and update them there.

    Only with the precision-aware optimizer does the hybrid optimizer hold no second master weight on the device.
    """
    if optimizer.host_fraction == 0:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": optimizer.host_fraction,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": True,
    }


def moment_fields(optimizer: OptimizerConfig) -> dict[str, Any]:
    """Return the fields that store the moments in bf16, with master weights in float32.

    Transformer Engine's FusedAdam then holds the master weights. `store_param_remainders` would store them as 16-bit
    remainders, which optimizer_state.py cannot save as numbers.
    """
    if optimizer.moments == "fp32":
        return {}
    return {
        "use_precision_aware_optimizer": True,
        "store_param_remainders": False,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
    }

"""Decisions of vLLM with the program's arguments on CUDA.

On Blackwell it would reorder experts in place; with the arguments it keeps them as they were loaded. It schedules a
step while the GPU computes the one before, which the planner counts.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from grpo_mega.engines.pass_through import installed_fields, owned_fields
from grpo_mega.engines.vllm.arguments import VllmSettings, engine_arguments
from grpo_mega.models.config_readers import spec_from_config
from tests.helpers.family_configs import raw_family_config
from tests.helpers.one_process import run


def arguments_on_cuda(family: str, *, fp8: bool = False) -> dict[str, Any]:
    settings = VllmSettings(Path(), "bf16", 1, 96, 8, None, 0, fp8=fp8)
    spec = spec_from_config(raw_family_config(family), "config.json")
    with mock.patch.object(torch.cuda, "is_available", return_value=True), mock.patch.dict(os.environ):
        return engine_arguments(settings, spec)


@dataclass(frozen=True)
class Choice:
    """The kernel that vLLM chooses for bf16 experts, and whether it leaves their memory as it is."""

    kernel: str
    keeps_order: bool


def choice_of_vllm(moe_backend: str, generation: int) -> Choice:
    """Ask vLLM on a CUDA platform of a compute generation, 9 or 10, where every kernel is available."""
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    platform = SimpleNamespace(
        is_cuda=lambda: True,
        is_device_capability_family=lambda family: family == 10 * generation,
        **dict.fromkeys(("is_rocm", "is_tpu", "is_out_of_tree", "is_xpu", "is_cpu"), lambda: False),
    )
    parallel = SimpleNamespace(dp_size=1, use_batched_activation_format=False, use_moonep_kernels=False)
    config = SimpleNamespace(
        moe_backend=moe_backend, moe_parallel_config=parallel, is_lora_enabled=False, activation="silu",
        is_act_and_mul=True, intermediate_size_per_partition=128, intermediate_size_per_partition_unpadded=128,
    )  # fmt: skip
    kernel = SimpleNamespace(is_supported_config=lambda *_: (True, None))
    gate_up = torch.arange(2 * 256 * 128, dtype=torch.float32).view(2, 256, 128).bfloat16()
    down = torch.arange(2 * 128 * 128, dtype=torch.float32).view(2, 128, 128).bfloat16()
    before = gate_up.clone(), down.clone()
    reorder = mock.Mock(side_effect=lambda *a, **k: gate_up.copy_(gate_up.flip(1)))
    with (
        mock.patch.object(unquantized, "current_platform", platform),
        mock.patch.object(unquantized, "backend_to_kernel_cls", return_value=[kernel]),
        mock.patch.object(unquantized, "convert_moe_weights_to_flashinfer_trtllm_block_layout", reorder),
    ):
        chosen, _ = unquantized.select_unquantized_moe_backend(config)
        converted = unquantized.convert_to_unquantized_kernel_format(chosen, config, gate_up, down)
    same = all(
        after.data_ptr() == weight.data_ptr() and torch.equal(weight, old)
        for after, weight, old in zip(converted, (gate_up, down), before, strict=True)
    )
    return Choice(chosen.value, same)


def schedules_ahead(folder: Path) -> bool | None:
    """Return what vLLM decides before its CPU platform, which alone changes it, has the configuration."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cpu import CpuPlatform

    settings = VllmSettings(folder, "bf16", 1, 96, 8, 4096, 0)
    arguments = engine_arguments(settings, spec_from_config(raw_family_config("qwen3"), "config.json"))
    decided: list[bool | None] = []
    change = CpuPlatform.check_and_update_config

    def record(config: Any) -> None:
        decided.append(config.scheduler_config.async_scheduling)
        change(config)

    with mock.patch.object(CpuPlatform, "check_and_update_config", staticmethod(record)):
        config = EngineArgs(**(arguments | {"load_format": "dummy"})).create_engine_config()
    assert config.scheduler_config.async_scheduling is False  # the CPU platform was asked
    return decided[0]


def test_vllm_schedules_ahead_with_the_program_s_arguments(recorder: ProcessPoolExecutor, tmp_path: Path) -> None:
    if installed_fields("vllm") is None:
        pytest.skip("vLLM is not installed here")
    (tmp_path / "config.json").write_text(json.dumps(raw_family_config("qwen3")))
    assert run(recorder, schedules_ahead, tmp_path) is True
    assert "async_scheduling" in owned_fields("vllm", on_cuda=True)  # no config switches it off


@pytest.mark.parametrize("generation", [9, 10])
def test_experts_keep_the_order_of_the_checkpoint(recorder: ProcessPoolExecutor, generation: int) -> None:
    if installed_fields("vllm") is None:
        pytest.skip("vLLM is not installed here")
    backend = arguments_on_cuda("qwen3_moe")["moe_backend"]
    assert run(recorder, choice_of_vllm, backend, generation) == Choice("TRITON", keeps_order=True)


def test_vllm_alone_would_reorder_experts_on_blackwell(recorder: ProcessPoolExecutor) -> None:
    """A failure means that the argument is no longer needed."""
    if installed_fields("vllm") is None:
        pytest.skip("vLLM is not installed here")
    assert not run(recorder, choice_of_vllm, "auto", 10).keeps_order


def test_only_models_with_experts_have_the_argument_and_a_user_cannot_change_it() -> None:
    assert "moe_backend" not in arguments_on_cuda("qwen3")
    assert arguments_on_cuda("deepseek_v3", fp8=True)["moe_backend"] == "triton"
    assert {"moe_backend", "kernel_config"} <= owned_fields("vllm", on_cuda=True).keys()
    assert "moe_runner_backend" in owned_fields("sglang", on_cuda=True)

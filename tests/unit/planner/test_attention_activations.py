"""Bytes that the attention of local modules keeps on CUDA, against what the module saves for its backward pass."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.planner.attention_activations import AttentionActivations
from grpo_mega.planner.hardware import cluster_of, gpu_named
from grpo_mega.planner.inputs import PlanInputs
from grpo_mega.planner.row_shape import PackedRowShape
from grpo_mega.policy.inspect.memory_use import saved_for_backward
from grpo_mega.policy.modules.flash_attention import Spans, flash_attention
from tests.helpers.attention_oracle import bounds_of
from tests.helpers.family_configs import raw_family_config
from tests.helpers.flash_on_cpu import install_flash_on_cpu
from tests.helpers.planner_cases import config_of


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_flash_kernel_keeps_its_inputs_its_output_and_one_number_per_head(family: str) -> None:
    install_flash_on_cpu()
    spec = spec_from_config(raw_family_config(family), "config.json")
    bounds, tokens = bounds_of([24, 40]), 64
    n, m, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
    row = PackedRowShape(tokens, tokens, tokens, 40, spec.hidden_size, itemsize=2, local=True, flash=True)
    projection = torch.randn(tokens, n + 2 * m, d).bfloat16().requires_grad_()
    with saved_for_backward([]) as saved:
        q, k, v = projection.split([n, m, m], 1)
        # the rotary embedding copies queries and keys; a view of the projection keeps all of it
        out = flash_attention(q.clone(), k.clone(), v, Spans(bounds, bounds, 40, 40), None)
        assert out.requires_grad
    assert saved.now == AttentionActivations(row, spec, ParallelConfig()).core()


@pytest.mark.parametrize(
    ("modules", "gpu", "dtype", "local", "flash"),
    [
        ("auto", "h100-80g", "bf16", False, True),
        ("local", "h100-80g", "bf16", True, True),
        ("local", "h100-80g", "fp32", True, False),
        ("auto", "cpu", "bf16", True, False),
    ],
)
def test_a_gpu_plan_is_for_transformer_engine_unless_local_modules_are_asked_for(
    modules: str, gpu: str, dtype: str, local: bool, flash: bool
) -> None:
    config = config_of(policy={"modules": modules}, precision={"dtype": dtype})
    spec = spec_from_config(raw_family_config("llama"), "config.json")
    row = PackedRowShape.from_inputs(PlanInputs.from_config(config, spec, cluster_of(gpu_named(gpu), 1)))
    assert (row.local, row.flash) == (local, flash)

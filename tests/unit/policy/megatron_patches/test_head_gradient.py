"""The head is built without apex; the test fails once the release needs no patch for it."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_mega.policy.megatron_patches.head_gradient import head_without_apex


def build_head() -> Any:
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        gradient_accumulation_fusion=True,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return ColumnParallelLinear(
        8, 16, config=config, init_method=torch.nn.init.zeros_, bias=False, skip_bias_add=False, tp_group=group
    )


def test_the_head_is_built_where_weight_gradients_are_accumulated_in_the_kernels() -> None:
    with head_without_apex():
        assert build_head().weight.shape == (16, 8)


@pytest.mark.skipif(importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None, reason="apex is installed")
def test_the_release_still_rejects_such_a_head_without_apex() -> None:
    with pytest.raises(RuntimeError, match="APEX"):
        build_head()

"""Builds the head without apex when weight gradients are accumulated in the kernels of Transformer Engine.

Megatron's ColumnParallelLinear raises an error without apex (tensor_parallel/layers.py:1070), because its own backward
pass would call a kernel of apex. The head is built as that class, and this program computes it from its weight
(modules/policy_model.py), so that the kernel is never called.
Asserted by tests/unit/policy/megatron_patches/test_head_gradient.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from grpo_mega.policy.megatron_patches import cpu

cpu.prepare_import()

from megatron.core.tensor_parallel import layers  # noqa: E402 - only after prepare_import


@contextmanager
def head_without_apex() -> Iterator[None]:
    """Build modules with `gradient_accumulation_fusion` although apex is not installed."""
    with mock.patch.object(layers, "_grad_accum_fusion_available", True):
        yield

"""vLLM with FP8 weights: its arguments, the tensors that its loader takes, and the kernels that are known to be safe.

vLLM has many kernels for FP8 blocks, and most transpose, pad or quantize again what was loaded: DeepGEMM computes other
scales, Marlin and FlashInfer use other orders. Two read values and scales where the loader put them, on every GPU that
has FP8: those of Triton and, for linear layers, CUTLASS. The arguments select Triton's kernels. When the engine is
built with any other kernel, the weight sink rejects it by name. No GPU has run this.
Written against vLLM 0.32; asserted by tests/engine/test_vllm_fp8.py, and on a GPU by tests/gpu/test_checks_on_gpu.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from grpo_mega.models.fp8_tensors import is_quantized
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.quantization.block_fp8 import FP8_DTYPE
from grpo_mega.quantization.fp8_checkpoint import SCALE_SUFFIX, fp8_shapes, quantization_config

Shape = tuple[int, ...]

PLAIN_LINEAR = ("TritonFp8BlockScaledMMKernel", "CutlassFp8BlockScaledMMKernel")
PLAIN_EXPERTS = ("TRITON", "BATCHED_TRITON")


def fp8_checkpoint_tensors(
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return name -> (shape, dtype) of the FP8 checkpoint that is quantized from a checkpoint with these tensors."""
    found = {}
    for name, shape in fp8_shapes({name: shape for name, (shape, _) in tensors.items()}).items():
        kept = tensors[name][1] if name in tensors else torch.float32
        found[name] = (shape, FP8_DTYPE if is_quantized(name, shape) else kept)
    return found


def model_overrides(spec: ModelSpec) -> dict[str, Any]:
    """Return `hf_overrides` with the FP8 `quantization_config`, which replaces that of the model's config.json."""
    return {"quantization_config": quantization_config(hf_shapes(spec))}


def fp8_arguments() -> dict[str, Any]:
    """Return the kernels for FP8 weights as arguments of vLLM's `EngineArgs`. Also turns DeepGEMM off."""
    os.environ["VLLM_USE_DEEP_GEMM"] = "0"  # it would also compute absorbed projections with other rounding
    return {"linear_backend": "triton", "moe_backend": "triton"}


@contextmanager
def built_for_fp8() -> Iterator[None]:
    """Let vLLM build FP8 models on any CPU, to record their loader; no kernel can compute with them.

    vLLM's kernel for FP8 blocks asks for AMX tiles and for an operation that only the AMX build of its library has.
    """
    from vllm import _custom_ops

    with (
        mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=True),
        mock.patch.object(_custom_ops, "_supports_cpu_fp8_w8a16", True),
    ):
        yield


def unknown_kernel(model: nn.Module, parameter: str) -> str | None:
    """Return the kernel that reads this FP8 parameter, or None if it is known to read values as they were loaded."""
    name = parameter.removesuffix(SCALE_SUFFIX)
    method: Any = getattr(model.get_submodule(name.rpartition(".")[0]), "quant_method", None)
    if hasattr(method, "fp8_linear"):
        kernel = type(method.fp8_linear).__name__
        return None if kernel in PLAIN_LINEAR else kernel
    backend = getattr(getattr(method, "fp8_backend", None), "value", type(method).__name__)
    return None if backend in PLAIN_EXPERTS else f"{backend} experts"

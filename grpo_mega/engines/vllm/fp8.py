"""vLLM with FP8 weights: what it is told, what its loader takes, and of which kernels we know what they read.

Its kernels for FP8 blocks are many, and most turn, pad or quantise again what was loaded (DeepGEMM makes other scales
of it, Marlin and FlashInfer other orders). Two read codes and scales where the loader put them, on every GPU that has
FP8: those of Triton and, of a linear layer, CUTLASS. The engine is told to take Triton's; any other is refused when it
is built, by name, instead of being written into blindly. No GPU has run this: unproven.
Written against vLLM 0.32; asserted by tests/engine/test_vllm_fp8.py, and on a GPU by tests/gpu/test_proof_on_gpu.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn

from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.quantization.block_fp8 import CODE
from grpo_mega.quantization.fp8_checkpoint import SCALE_SUFFIX, fp8_shapes, is_coded, quantization_config

Shape = tuple[int, ...]

Fp8Weights = Literal["codes", "own_loader"]
OWN_LOADER = "engine.fp8=own_loader: the engine quantises whole tensors itself"
PLAIN_LINEAR = ("TritonFp8BlockScaledMMKernel", "CutlassFp8BlockScaledMMKernel")
PLAIN_EXPERTS = ("TRITON", "BATCHED_TRITON")


def fp8_checkpoint_tensors(
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Shape and dtype of every tensor of the FP8 checkpoint of one with these."""
    found = {}
    for name, shape in fp8_shapes({name: shape for name, (shape, _) in tensors.items()}).items():
        kept = tensors[name][1] if name in tensors else torch.float32
        found[name] = (shape, CODE if is_coded(name, shape) else kept)
    return found


def model_overrides(spec: ModelSpec) -> dict[str, Any]:
    """`hf_overrides`: of what the model's config.json says, or does not say, of quantisation."""
    return {"quantization_config": quantization_config(hf_shapes(spec))}


def fp8_arguments(weights: Fp8Weights, spec: ModelSpec) -> dict[str, Any]:
    """Engine arguments. Of codes that a sync writes they choose the kernels too; what vLLM has quantised itself may
    have any form."""
    if weights == "own_loader":
        kept = quantization_config(hf_shapes(spec))["modules_to_not_convert"]
        return {"quantization": "fp8_per_block", "quantization_config": {"ignore": kept}}
    os.environ["VLLM_USE_DEEP_GEMM"] = "0"  # it would also make absorbed projections by a product, rounded otherwise
    return {"hf_overrides": model_overrides(spec), "linear_backend": "triton", "moe_backend": "triton"}


def built_for_fp8() -> AbstractContextManager[object]:
    """Inside, vLLM builds FP8 models on a CPU without AMX tiles, where it has no kernel to compute with them: to record
    a loader, never to run."""
    return mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=True)


class Requantisation:
    """Loads whole tensors into a model that quantises them: layer by layer, each when its last tensor has come. Until
    then these stay alive. What kernels and CUDA graphs point to stays where it is."""

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        self._model, self._model_config = model, model_config

    def begin(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self._model)

    def end(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self._model, self._model_config)


def unknown_kernel(model: nn.Module, parameter: str) -> str | None:
    """The kernel that computes with these codes or scales, unless it is known to read them as they were loaded."""
    name = parameter.removesuffix(SCALE_SUFFIX)
    method: Any = getattr(model.get_submodule(name.rpartition(".")[0]), "quant_method", None)
    if hasattr(method, "fp8_linear"):
        kernel = type(method.fp8_linear).__name__
        return None if kernel in PLAIN_LINEAR else kernel
    backend = getattr(getattr(method, "fp8_backend", None), "value", type(method).__name__)
    return None if backend in PLAIN_EXPERTS else f"{backend} experts"

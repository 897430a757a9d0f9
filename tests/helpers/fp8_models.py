"""Tiny models whose matrices are whole 128-blocks, and vLLM's FP8 models of them without compute kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from grpo_mega.engines.weights.loader_recording import LoaderRecord
from grpo_mega.models.config_readers import read_spec
from grpo_mega.models.fp8_tensors import is_quantized
from grpo_mega.quantization.block_fp8 import quantize
from grpo_mega.quantization.fp8_checkpoint import SCALE_SUFFIX
from tests.helpers.family_configs import raw_family_config

_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 256,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 0,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
FP8_MODELS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen2": _SIZES | {"hidden_size": 512},  # head size is hidden_size / num_attention_heads
    "qwen3": _SIZES,
    "qwen3_moe": _SIZES | {"moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": _SIZES | {"intermediate_size": 256},
    "glm4_moe": _SIZES | _EXPERTS,
    "deepseek_v3": {k: v for k, v in _SIZES.items() if k != "head_dim"} | _EXPERTS | _LATENT,
}


def make_fp8_model(folder: Path, family: str, **changes: Any) -> Path:
    """Write a folder with only a config.json for bf16 weights; `changes` replace its fields."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = raw_family_config(family, **FP8_MODELS[family] | changes)
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": 1, "bos_token_id": 0}))
    return folder


def fp8_tensors_of(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    from grpo_mega.engines.vllm.arguments import checkpoint_tensors

    return checkpoint_tensors(read_spec(folder), torch.bfloat16, fp8=True)


def record_fp8(folder: Path, tp: int, ranks: list[int], spread: bool, dp: int = 1) -> list[LoaderRecord]:
    """Record vLLM's loader; call it in a separate process."""
    from grpo_mega.engines.vllm.offline import record_ranks

    return record_ranks(
        folder, fp8_tensors_of(folder), dtype="bf16", tp=tp, dp=dp, ranks=ranks, experts_spread=spread, fp8=True
    )


def bf16_weights(folder: Path, seed: int) -> dict[str, Tensor]:
    """Return random bf16 weights."""
    from grpo_mega.engines.vllm.arguments import checkpoint_tensors

    generator = torch.Generator().manual_seed(seed)
    tensors = checkpoint_tensors(read_spec(folder), torch.bfloat16)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in tensors.items()}


def fp8_weights(folder: Path, seed: int) -> dict[str, Tensor]:
    """Return the FP8 checkpoint of `bf16_weights`."""
    found = {}
    for name, values in bf16_weights(folder, seed).items():
        found[name] = values
        if is_quantized(name, tuple(values.shape)):
            found[name], found[name + SCALE_SUFFIX] = quantize(values)
    return found


@contextmanager
def kernels_of_cuda() -> Iterator[None]:
    """Make vLLM choose Triton's kernels, as the arguments do on a GPU, and build everything except expert kernels.

    No such model can compute on a CPU.
    """
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization import fp8
    from vllm.model_executor.layers.quantization.online import fp8 as online
    from vllm.platforms import PlatformEnum

    triton = linear.TritonFp8BlockScaledMMKernel
    with ExitStack() as stack:
        # as in a CPU engine, bf16 matrices stay plain
        stack.enter_context(mock.patch.object(LinearBase, "_cpu_skip_gemm_dispatch", True, create=True))
        stack.enter_context(mock.patch.dict(linear._POSSIBLE_FP8_BLOCK_KERNELS, {PlatformEnum.CPU: [triton]}))
        stack.enter_context(mock.patch.object(triton, "is_supported", return_value=(True, None)))
        for module in (fp8, online):
            chosen = mock.patch.object(module, "select_fp8_moe_backend", return_value=(Fp8MoeBackend.TRITON, object))
            stack.enter_context(chosen)
        stack.enter_context(mock.patch.object(fp8.Fp8MoEMethod, "_init_moe_kernel"))
        stack.enter_context(mock.patch.object(oracle, "make_fp8_moe_kernel"))
        yield


@contextmanager
def _without_amx() -> Iterator[None]:
    """Hide AMX, with which vLLM chooses another latent attention, and clear vLLM's cached choice."""
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()
    with mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=False):
        yield
    selector._cached_get_attn_backend.cache_clear()


def build_fp8(
    folder: Path, tp: int, rank: int, *, spread: bool = False, loaded: dict[str, Tensor] | None = None
) -> tuple[nn.Module, LoaderRecord]:
    """Return vLLM's model of one rank in real memory and the record of its loader.

    The model has loaded the tensors in `loaded` and was processed as after loading.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    from grpo_mega.engines.vllm import offline
    from grpo_mega.engines.vllm.recording_loader import record_vllm

    built: list[nn.Module] = []

    def keep(model: Any, tensors: Any) -> LoaderRecord:
        record = record_vllm(model, tensors)
        model.load_weights(iter((loaded or {}).items()))
        process_weights_after_loading(model, get_current_vllm_config().model_config, torch.device("cpu"))
        built.append(model)
        return record

    with (
        kernels_of_cuda(),
        mock.patch.object(offline, "built_for_fp8", _without_amx),
        mock.patch.object(offline, "record_vllm", keep),
        mock.patch.object(offline, "_FloatsOnMeta", mock.MagicMock),
    ):
        (record,) = record_fp8(folder, tp, [rank], spread)
    return built[0], record

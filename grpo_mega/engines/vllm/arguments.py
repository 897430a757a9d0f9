"""Settings of one vLLM replica and the `EngineArgs` made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from grpo_mega.engines.vllm.fp8 import Fp8Weights, fp8_arguments, fp8_checkpoint_tensors
from grpo_mega.engines.vllm.record import RECORDING
from grpo_mega.models.kv_cache import CACHE_FORMATS, CUDA_MEMORY_SHARE, KvCacheSize
from grpo_mega.models.parameter_tables import hf_shapes, keeps_float32
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import UserError

BLOCK_TOKENS = CACHE_FORMATS["vllm"].block_tokens


_EXPERT_MULTIPLE = 32  # rows and columns, in cpu_moe.py


_CPU_LATENT = (512, 64)  # kv_lora_rank and qk_rope_head_dim, in csrc/cpu/mla_decode.cpp


@dataclass(frozen=True)
class VllmSettings:
    """How one replica is built. Sizes in tokens and sequences; `kv_cache_tokens` None: what `max_num_seqs` rollouts of
    `max_model_len` tokens need (on CUDA: a share of the device)."""

    config_dir: Path
    dtype: Literal["fp32", "bf16"]
    tp: int
    max_model_len: int
    max_num_seqs: int
    kv_cache_tokens: int | None
    seed: int
    dp: int = 1
    """Copies of the attention: the replica has tp * dp ranks, and the sizes are of each copy."""
    experts_spread: bool = False
    """Experts are whole on one rank each, not cut over all."""
    tell_experts: bool = False
    """Take down which experts each token is sent to."""
    fp8: Fp8Weights | None = None
    """Hold matrices as FP8 codes and scales: those that a sync brings, or of the loader's making."""


def kv_cache_size(settings: VllmSettings) -> KvCacheSize:
    """Return the size of the KV cache of one copy of the attention."""
    return KvCacheSize("vllm", settings.max_model_len, settings.max_num_seqs, settings.kv_cache_tokens)


def kv_cache_bytes(settings: VllmSettings, spec: ModelSpec) -> int:
    """Return the bytes of the KV cache on one rank (models/kv_cache.py).

    Raises:
        UserError: `engine.kv_cache_tokens` does not hold one rollout of full length.
    """
    return kv_cache_size(settings).num_bytes(spec, settings.tp, 4 if settings.dtype == "fp32" else 2)


def check_cpu_head(spec: ModelSpec) -> None:
    """Refuse what would fail only at the first token, deep inside the kernels."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if spec.mla is not None:
        if (spec.mla.kv_rank, spec.mla.rope_dim) != _CPU_LATENT:
            raise UserError(
                f"model.path: kv_lora_rank={spec.mla.kv_rank}, qk_rope_head_dim={spec.mla.rope_dim} of config.json: "
                f"vLLM's latent attention on CPU takes {_CPU_LATENT[0]} and {_CPU_LATENT[1]}",
                remedy="use these",
            )
        return
    head_dim = spec.head_dim
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in sizes:
        raise UserError(
            f"model.path: head_dim={head_dim} of config.json: vLLM's attention on CPU takes heads of "
            f"{', '.join(map(str, sizes))}",
            remedy="use one of them",
        )


def check_cpu_experts(settings: VllmSettings, spec: ModelSpec) -> None:
    """Refuse what the kernel would pad: then the weights are not where the loader put them."""
    ways = 1 if settings.experts_spread else settings.tp * settings.dp
    if spec.moe is None:
        return
    if spec.moe.expert_ffn_size % (ways * _EXPERT_MULTIPLE) or spec.hidden_size % _EXPERT_MULTIPLE:
        ranks = settings.tp * settings.dp
        raise UserError(
            f"engine.tp={settings.tp}, engine.dp={settings.dp}, engine.ep={ranks // ways}: vLLM's kernel on CPU takes "
            f"experts whose rows on a rank are a multiple of {_EXPERT_MULTIPLE}, here {spec.moe.expert_ffn_size} / "
            f"{ways}",
            remedy=f"use engine.ep={ranks} or fewer ranks",
        )


def checkpoint_tensors(
    spec: ModelSpec, dtype: torch.dtype, *, fp8: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and dtype of every tensor that a sync brings. `fp8`: matrices as codes and scales."""
    plain = {name: (shape, torch.float32 if keeps_float32(name) else dtype) for name, shape in hf_shapes(spec).items()}
    return fp8_checkpoint_tensors(plain) if fp8 else plain


def engine_arguments(settings: VllmSettings, spec: ModelSpec) -> dict[str, Any]:
    """Return the keyword arguments of vLLM's `EngineArgs` for one replica."""
    arguments: dict[str, Any] = {
        "model": str(settings.config_dir),
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings.dtype],
        "load_format": RECORDING,  # the first sync brings the weights
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # ignore the model's own sampling defaults
        "logprobs_mode": "processed_logprobs",
        "distributed_executor_backend": "external_launcher",
        "tensor_parallel_size": settings.tp,
        "data_parallel_size": settings.dp,
        "enable_expert_parallel": settings.experts_spread,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": kv_cache_size(settings).batched_tokens,
        "block_size": BLOCK_TOKENS,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": settings.seed,
    }
    if settings.fp8 is not None:
        arguments |= fp8_arguments(settings.fp8, spec)
    on_cuda = torch.cuda.is_available()
    if settings.kv_cache_tokens is not None or not on_cuda:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes(settings, spec)
    if on_cuda:
        arguments |= {"gpu_memory_utilization": CUDA_MEMORY_SHARE, "enable_sleep_mode": True}
    else:
        arguments["enforce_eager"] = True
        if spec.mla is not None:  # with AMX vLLM would take a kernel that reads packed copies of its own
            arguments["attention_backend"] = "CPU_MLA"
    return arguments

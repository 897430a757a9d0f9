"""Settings of one vLLM replica and the `EngineArgs` made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_mega.config.schema import Config
from grpo_mega.engines.replica_settings import ReplicaSettings
from grpo_mega.engines.vllm.fp8 import fp8_arguments, fp8_checkpoint_tensors, model_overrides
from grpo_mega.engines.vllm.recording_loader import RECORDING
from grpo_mega.models.engine_memory import SLEEP_MODES
from grpo_mega.models.kv_cache_memory import CACHE_FORMATS, KvCacheSize
from grpo_mega.models.parameter_tables import hf_shapes, keeps_float32
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import UserError

BLOCK_TOKENS = CACHE_FORMATS["vllm"].block_tokens
_EXPERT_MULTIPLE = 32  # rows and columns of an expert, in cpu_moe.py
_CPU_LATENT = (512, 64)  # kv_lora_rank and qk_rope_head_dim, in csrc/cpu/mla_decode.cpp


@dataclass(frozen=True)
class VllmSettings(ReplicaSettings):
    """Settings of one vLLM replica of tp * dp ranks; with `ep` above 1 it is tp * dp."""

    dp: int = 1
    """Data-parallel copies of the attention; they share the experts."""
    fp8: bool = False
    """Hold matrices as FP8 values with a scale per 128 x 128 block; a sync brings both."""

    @classmethod
    def from_config(cls, config: Config, model_folder: Path) -> VllmSettings:
        """Return the settings of the replica that the config asks for."""
        return cls.from_parts(config, model_folder, dp=config.engine.dp, fp8=config.engine.fp8 is not None)


def kv_cache_size(settings: VllmSettings) -> KvCacheSize:
    """Return the size of the KV cache of one copy of the attention."""
    return KvCacheSize("vllm", settings.max_model_len, settings.max_num_seqs, settings.kv_cache_tokens)


def kv_cache_bytes(settings: VllmSettings, spec: ModelSpec) -> int:
    """Return the bytes of the KV cache on one rank (models/kv_cache_memory.py).

    Raises:
        UserError: `engine.kv_cache_tokens` does not hold one rollout of full length.
    """
    return kv_cache_size(settings).num_bytes(spec, settings.tp, 4 if settings.dtype == "fp32" else 2)


def check_cpu_head(spec: ModelSpec) -> None:
    """Check the size of an attention head, which the CPU kernels would reject only at the first token.

    Raises:
        UserError: vLLM has no CPU kernel for this size.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if spec.mla is not None:
        if (spec.mla.kv_rank, spec.mla.rope_dim) != _CPU_LATENT:
            raise UserError(
                f"model.path: kv_lora_rank={spec.mla.kv_rank}, qk_rope_head_dim={spec.mla.rope_dim} of config.json: "
                f"vLLM's latent attention on CPU supports only {_CPU_LATENT[0]} and {_CPU_LATENT[1]}",
                remedy="use a model with these sizes, or GPUs",
            )
        return
    head_dim = spec.head_dim
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in sizes:
        raise UserError(
            f"model.path: head_dim={head_dim} of config.json: vLLM's attention on CPU supports only "
            f"{', '.join(map(str, sizes))}",
            remedy="use a model with one of these sizes, or GPUs",
        )


def check_cpu_experts(settings: VllmSettings, spec: ModelSpec) -> None:
    """Check that the CPU kernel does not pad the experts: padding moves weights away from where they are loaded.

    Raises:
        UserError: rows or columns of an expert on one rank are not a multiple of 32.
    """
    ways = 1 if settings.ep > 1 else settings.tp * settings.dp
    if spec.moe is None:
        return
    if spec.moe.expert_ffn_size % (ways * _EXPERT_MULTIPLE) or spec.hidden_size % _EXPERT_MULTIPLE:
        ranks = settings.tp * settings.dp
        raise UserError(
            f"engine.tp={settings.tp}, engine.dp={settings.dp}, engine.ep={ranks // ways}: vLLM's CPU kernel needs "
            f"experts whose rows on each rank are a multiple of {_EXPERT_MULTIPLE}, and the model has "
            f"{spec.moe.expert_ffn_size} / {ways}",
            remedy=f"use engine.ep={ranks} or fewer ranks",
        )


def checkpoint_tensors(
    spec: ModelSpec, dtype: torch.dtype, *, fp8: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> (shape, dtype) of every tensor that a weight sync brings.

    Args:
        spec: the model.
        dtype: of the engine; parameters that families keep in float32 stay float32.
        fp8: list matrices as FP8 values and scales.
    """
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
        "enable_expert_parallel": settings.ep > 1,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": kv_cache_size(settings).batched_tokens,
        "block_size": BLOCK_TOKENS,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": settings.seed,
        # not that of config.json, if the files hold a head that differs from the embedding (formats/stored_head.py)
        "hf_overrides": {"tie_word_embeddings": spec.tie_embeddings},
    }
    if settings.fp8:
        arguments |= fp8_arguments()
        arguments["hf_overrides"] |= model_overrides(spec)
    on_cuda = torch.cuda.is_available()
    if settings.kv_cache_tokens is not None or not on_cuda:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes(settings, spec)
    if on_cuda:
        arguments |= {
            "gpu_memory_utilization": settings.memory_share,
            "enable_sleep_mode": True,
            "sleep_mode_offload_cudagraph": SLEEP_MODES["vllm"].offloads_graphs,
            "enable_nccl_comm_suspend": SLEEP_MODES["vllm"].suspends_communicators,
        }
        if spec.moe is not None:
            # On Blackwell layers/fused_moe/oracle/unquantized.py:70 would prefer FlashInfer's kernels, which reorder
            # experts in place. Triton's, the default on Hopper, read them as they were loaded.
            arguments["moe_backend"] = "triton"
    else:
        arguments["enforce_eager"] = True
        if spec.mla is not None:  # with AMX vLLM would choose a kernel that reads packed copies of the weights
            arguments["attention_backend"] = "CPU_MLA"
    return arguments | settings.args

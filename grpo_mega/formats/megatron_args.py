"""The arguments that Megatron-LM expects in `common.pt`; `--use-checkpoint-args` and its loader read them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from grpo_mega.models.spec import MlaSpec, ModelSpec, MoeSpec


def megatron_args(spec: ModelSpec, dtype: torch.dtype, iteration: int = 0) -> Namespace:
    """Return the arguments of a checkpoint of one rank without optimizer state, by Megatron-LM's names."""
    return Namespace(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_size,
        num_attention_heads=spec.num_heads,
        group_query_attention=spec.num_kv_heads != spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        **_moe_args(spec),
        **_mla_args(spec),
        **_rope_args(spec),
        mtp_num_layers=spec.num_mtp_layers or None,
        seq_length=spec.max_positions,
        max_position_embeddings=spec.max_positions,
        position_embedding_type="rope",
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        rotary_base=spec.rope_theta,
        rotary_percent=spec.rotary_fraction,
        rotary_interleaved=False,
        swiglu=True,
        normalization="RMSNorm",
        norm_epsilon=spec.norm_eps,
        layernorm_epsilon=spec.norm_eps,
        apply_layernorm_1p=False,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm or spec.mla is not None,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        untie_embeddings_and_output_weights=not spec.tie_embeddings,
        vocab_size=spec.vocab_size,
        padded_vocab_size=spec.vocab_size,
        make_vocab_size_divisible_by=1,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=None,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        sequence_parallel=False,
        world_size=1,
        data_parallel_size=1,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        transformer_impl="transformer_engine",
        ckpt_format="torch_dist",
        use_dist_ckpt=True,
        dist_ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
        finetune=False,
        iteration=iteration,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
        num_floating_point_operations_so_far=0,
    )


def expert_settings(moe: MoeSpec) -> dict[str, Any]:
    """Return the settings of experts and router; their names are equal in Megatron-LM and Megatron-Core."""
    limited = moe.top_groups < moe.num_groups
    return {
        "moe_ffn_hidden_size": moe.expert_ffn_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size or None,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.score,
        # softmax over the chosen experts is softmax over all experts, renormalized over the chosen
        "moe_router_pre_softmax": moe.score == "softmax" and not moe.normalize,
        "moe_router_num_groups": moe.num_groups if limited else None,
        "moe_router_group_topk": moe.top_groups if limited else None,
        "moe_router_topk_scaling_factor": None if moe.scaling == 1.0 else moe.scaling,
        "moe_router_enable_expert_bias": moe.correction_bias,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
    }


def latent_settings(mla: MlaSpec) -> dict[str, Any]:
    """Return the sizes of latent attention; their names are equal in Megatron-LM and Megatron-Core."""
    return {
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_head_dim": mla.nope_dim,
        "qk_pos_emb_head_dim": mla.rope_dim,
        "v_head_dim": mla.v_dim,
    }


def _moe_args(spec: ModelSpec) -> dict[str, Any]:
    moe = spec.moe
    if moe is None:
        return {"num_experts": None}
    return {
        **expert_settings(moe),
        "num_experts": moe.num_experts,
        "moe_layer_freq": 1 if all(moe.layers) else [int(has_experts) for has_experts in moe.layers],
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": True,
    }


def _mla_args(spec: ModelSpec) -> dict[str, Any]:
    mla = spec.mla
    if mla is None:
        return {"multi_latent_attention": False}
    return {"multi_latent_attention": True, **latent_settings(mla)}


def _rope_args(spec: ModelSpec) -> dict[str, Any]:
    rope = spec.rope
    names: dict[str, Any] = {"use_rope_scaling": rope is not None and rope.kind == "llama3"}
    if rope is None:
        return names | ({"rope_type": "rope"} if spec.mla is not None else {})
    if rope.kind == "llama3":
        return names | {"rope_scaling_factor": rope.factor}
    if rope.kind == "linear":
        return names | {"rotary_seq_len_interpolation_factor": rope.factor}
    return names | {
        "rope_type": "yarn",
        "rotary_scaling_factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_positions,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale_all_dim": rope.mscale_all_dim,
    }

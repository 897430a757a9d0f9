"""The arguments that Megatron-LM expects in `common.pt`: what `--use-checkpoint-args` and its loader read."""

from __future__ import annotations

from argparse import Namespace

import torch

from grpo_mega.convert.spec import ModelSpec


def megatron_args(spec: ModelSpec, dtype: torch.dtype, iteration: int = 0) -> Namespace:
    """Of a checkpoint of one rank without optimizer; Megatron-LM's names."""
    return Namespace(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_size,
        num_attention_heads=spec.num_heads,
        group_query_attention=spec.num_kv_heads != spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        seq_length=spec.max_positions,
        max_position_embeddings=spec.max_positions,
        position_embedding_type="rope",
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        rotary_base=spec.rope_theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        swiglu=True,
        normalization="RMSNorm",
        norm_epsilon=spec.norm_eps,
        layernorm_epsilon=spec.norm_eps,
        apply_layernorm_1p=False,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
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

"""A small config.json of every family with all optional parts of the family enabled."""

from __future__ import annotations

from typing import Any

_BASE: dict[str, Any] = {
    "vocab_size": 21,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_DEEPSEEK_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}

# name -> (architecture, model_type, settings in addition to the base)
FAMILY_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama", {}),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", {}),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {"head_dim": 32}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": ("MixtralForCausalLM", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        _MLA | _DEEPSEEK_EXPERTS | {"topk_method": "group_limited_greedy", "norm_topk_prob": False},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        _MLA | _DEEPSEEK_EXPERTS | {"norm_topk_prob": True, "num_nextn_predict_layers": 1},
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        "glm4_moe",
        _DEEPSEEK_EXPERTS
        | {
            "head_dim": 32,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
            "use_qk_norm": True,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "gpt_oss",
        {
            "head_dim": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "swiglu_limit": 0.5,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    ),
}


def raw_family_config(family: str, **changes: Any) -> dict[str, Any]:
    """Return the fields of a config.json."""
    architecture, model_type, settings = FAMILY_CONFIGS[family]
    return {"architectures": [architecture], "model_type": model_type} | _BASE | settings | changes

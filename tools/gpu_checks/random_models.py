"""Random models whose log-probs depend visibly on attention, position and choice of experts.

They are written from the shapes of the checkpoint, without building a model: that takes seconds for a billion
parameters, and needs no modeling code of transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from grpo_mega.config.model_sections import ArchitectureConfig
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.models.parameter_tables import hf_shapes, keeps_float32

VOCAB = 512
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
                  "deepseek_v3": "DeepseekV3ForCausalLM"}  # fmt: skip
_COMMON = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_LARGE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 128}  # fmt: skip
_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1,
            "mlp_only_layers": []}  # fmt: skip
_LATENT = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
           "n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5}  # fmt: skip
# heads of DeepSeek-V3's sizes; its head_dim is that of the rotary part
_LATENT_LARGE = {"num_key_value_heads": 4, "head_dim": 64, "q_lora_rank": 256, "kv_lora_rank": 128,
                 "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}  # fmt: skip
_LATENT_TINY = {"num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 20, "kv_lora_rank": 24,
                "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}  # fmt: skip

# family -> settings of both sizes, settings of the large one, settings of the tiny one
_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "dense": ({"model_type": "qwen3"}, {}, {}),
    "moe": ({"model_type": "qwen3_moe"} | _EXPERTS, {"moe_intermediate_size": 256}, {"moe_intermediate_size": 32}),
    "mla": ({"model_type": "deepseek_v3"} | _LATENT, {"moe_intermediate_size": 256} | _LATENT_LARGE,
            {"moe_intermediate_size": 32} | _LATENT_TINY),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)


def family_fields(family: str, *, tiny: bool) -> dict[str, Any]:
    """Return the fields of the config.json of a family in one of two sizes."""
    both, large, small = _FAMILIES[family]
    return _COMMON | (_TINY if tiny else _LARGE) | both | (small if tiny else large)


def dense_fields(shape: ArchitectureConfig, vocab_size: int) -> dict[str, Any]:
    """Return the fields of the config.json of a dense Qwen3 with these sizes."""
    return _COMMON | {
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tie_embeddings,
    }


def write_random_model(folder: Path, fields: dict[str, Any], device: torch.device, seed: int = 0) -> int:
    """Write a model with random bf16 weights and return its number of parameters.

    Every tensor is random. Matrices keep the variance of their input, norms are near 1, and the logits have a standard
    deviation of about 2, so that an error of attention, position or expert changes log-probs by tenths.
    """
    from safetensors.torch import save_file

    folder.mkdir()
    raw = fields | {"architectures": [_ARCHITECTURES[fields["model_type"]]], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, shape in hf_shapes(checkpoint_spec(folder)).items():
        center, scale = _distribution(name, shape)
        values = center + scale * torch.randn(shape, generator=generator, device=device)
        tensors[name] = values.to("cpu", torch.float32 if keeps_float32(name) else torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return mean and standard deviation of a tensor."""
    if "embed_tokens" in name:
        return 0.0, 1.0
    if len(shape) == 1:
        return (1.0, 0.1) if "norm" in name else (0.0, 0.1)
    return 0.0, (2.0 if "lm_head" in name else 1.0) * float(shape[-1]) ** -0.5

"""The `ModelSpec` of a tiny base, which the config describes instead of a model folder."""

from __future__ import annotations

from grpo_mega.config.model_sections import ArchitectureConfig
from grpo_mega.models.spec import ModelSpec


def recipe_spec(recipe: ArchitectureConfig, vocab_size: int = 1) -> ModelSpec:
    """Return the spec of a tiny base that does not exist yet; `vocab_size` is that of its tokenizer."""
    return ModelSpec(
        family="qwen3",
        num_layers=recipe.num_layers,
        hidden_size=recipe.hidden_size,
        ffn_size=recipe.ffn_size,
        num_heads=recipe.num_heads,
        num_kv_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        vocab_size=vocab_size,
        max_positions=recipe.max_positions,
        rope_theta=10000.0,
        norm_eps=1e-6,
        tie_embeddings=recipe.tie_embeddings,
        qkv_bias=False,
        qk_norm=True,
    )

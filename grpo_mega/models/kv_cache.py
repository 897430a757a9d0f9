"""Sizes of a KV cache: elements and bytes per token on one rank. One home for planner, vLLM and SGLang."""

from __future__ import annotations

from grpo_mega.models.spec import ModelSpec


def cached_elements(spec: ModelSpec, tp: int) -> int:
    """Of one token in one layer on one rank: keys and values of its heads, or the latent that all heads share."""
    if spec.mla is not None:
        return spec.mla.kv_rank + spec.mla.rope_dim
    return 2 * local_kv_heads(spec, tp) * spec.head_dim


def local_kv_heads(spec: ModelSpec, tp: int) -> int:
    """KV heads on each rank of an engine."""
    return max(1, spec.num_kv_heads // tp)


def kv_bytes_per_token(spec: ModelSpec, tp: int, itemsize: int) -> float:
    """Of one rank: keys and values of its heads, or the latent vector, which every rank has."""
    if spec.mla is not None:
        return spec.num_layers * (spec.mla.kv_rank + spec.mla.rope_dim) * itemsize
    return spec.num_layers * 2 * max(1, spec.num_kv_heads // tp) * spec.head_dim * itemsize

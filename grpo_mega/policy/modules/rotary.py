"""Rotary frequencies as transformers computes them, and their use in Megatron's modules.

Megatron hard-codes three of the four numbers of Llama 3's scaling (rotary_pos_embedding.py:110). It derives YaRN's
scale of cosine and sine from settings that a checkpoint may override. Therefore this module computes all frequencies.
Asserted by tests/unit/policy/modules/test_rotary.py against transformers, and by tests/parallel/test_families.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from grpo_mega.models.spec import ModelSpec, RopeScaling


def rotary_frequencies(spec: ModelSpec) -> Tensor:
    """Return [D/2] float32 radians per position for the D rotated dimensions of a head, on the CPU.

    Source: RoFormer, arXiv:2104.09864, equation 15; Llama 3.1's released code; YaRN, arXiv:2309.00071, section 3.2.
    """
    width = spec.mla.rope_dim if spec.mla is not None else int(spec.head_dim * spec.rotary_fraction)
    plain = 1.0 / (spec.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width))
    rope = spec.rope
    if rope is None:
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    weight = _llama3_weight(plain, rope) if rope.kind == "llama3" else _yarn_weight(width, spec.rope_theta, rope)
    return (1 - weight) * plain / rope.factor + weight * plain


def set_frequencies(rotary: Any, spec: ModelSpec) -> None:
    """Set the frequencies of Megatron's rotary module to those of `spec`."""
    frequencies = rotary_frequencies(spec).to(rotary.inv_freq.device)
    rotary.inv_freq = frequencies
    if hasattr(rotary, "inv_freq_extra"):  # YarnRotaryEmbedding interpolates between these two, so they are set equal
        rotary.inv_freq_extra = rotary.inv_freq_inter = frequencies
        rotary.mscale, rotary.mscale_all_dim = megatron_mscale(spec), 0.0
        rotary._set_cos_sin_cache(rotary.max_seq_len_cached, 0, rotary.dtype_cached)
    rotary.forward.cache_clear()


def megatron_mscale(spec: ModelSpec) -> float:
    """Return the mscale for which Megatron computes `attention_factor` = 0.1 mscale ln(factor) + 1."""
    assert spec.rope is not None, "only YaRN has an attention factor"
    return (spec.rope.attention_factor - 1) / (0.1 * math.log(spec.rope.factor)) if spec.rope.factor > 1 else 0.0


def _llama3_weight(plain: Tensor, rope: RopeScaling) -> Tensor:
    """Return the weight [D/2] in [0, 1] of the unscaled frequency in Llama 3's interpolation."""
    rotations = rope.original_max_positions * plain / (2 * math.pi)
    weight = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return weight.clamp(0, 1)


def _yarn_weight(width: int, theta: float, rope: RopeScaling) -> Tensor:
    """Return the weight of the unscaled frequency in YaRN's interpolation.

    It is linear in the dimension, between the dimensions that rotate `beta_fast` and `beta_slow` times.
    """

    def dimension(turns: float) -> float:
        return width * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    return 1 - ((torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)

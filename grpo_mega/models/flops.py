"""Floating-point operations of a model, from its sizes: the only home of these formulas.

A product of [m, k] and [k, n] has 2 m k n operations. Counted are the matrices of the layers and the head, and the two
products of attention; embedding lookups, norms, activations and softmax are not. Experts count as often as a token
chooses them. The backward pass has twice the operations of the forward pass. Operations that an implementation makes
again (recomputation of activations, of the logits) or for nothing (padding, the masked half of attention) are not work
of the model and do not count.
Source: arXiv:2104.04473, appendix. Asserted by tests/parallel/test_flops.py, which counts those of the real modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo_mega.models.spec import ModelSpec

TRAINED_PASSES = 3
"""Operations of a forward and backward pass over those of the forward pass."""


@dataclass(frozen=True)
class WeightsPerToken:
    """Weights that a token is multiplied with, over all layers and ranks."""

    attention: int
    """Projections of queries, keys, values and output."""
    dense: int
    """Feed-forward of layers without experts."""
    experts: int
    """The experts that a token chooses, and the shared expert."""
    router: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.attention + self.dense + self.experts + self.router + self.head


def weights_per_token(spec: ModelSpec) -> WeightsPerToken:
    """Return the weights that a token is multiplied with; a tied head counts, the embedding is a lookup."""
    num_moe = 0 if spec.moe is None else sum(spec.moe.layers)
    h = spec.hidden_size
    experts = router = 0
    if spec.moe is not None:
        experts = num_moe * 3 * h * (spec.moe.top_k * spec.moe.expert_ffn_size + spec.moe.shared_ffn_size)
        router = num_moe * h * spec.moe.num_experts
    return WeightsPerToken(
        attention=spec.num_layers * _projections(spec),
        dense=(spec.num_layers - num_moe) * 3 * h * spec.ffn_size,
        experts=experts,
        router=router,
        head=spec.vocab_size * h,
    )


def _projections(spec: ModelSpec) -> int:
    """Return the weights of the projections of one attention layer."""
    h, heads = spec.hidden_size, spec.num_heads
    if spec.mla is None:
        return h * spec.head_dim * (2 * heads + 2 * spec.num_kv_heads)
    mla = spec.mla
    query = heads * (mla.nope_dim + mla.rope_dim)
    queries = h * query if mla.q_rank is None else h * mla.q_rank + mla.q_rank * query
    keys_and_values = h * (mla.kv_rank + mla.rope_dim) + mla.kv_rank * heads * (mla.nope_dim + mla.v_dim)
    return queries + keys_and_values + heads * mla.v_dim * h


def attention_flops(spec: ModelSpec, lengths: Sequence[float]) -> float:
    """Return the operations of q k^T and of the sum of values, over all layers, in the forward pass.

    A query of position i sees i + 1 keys, or `sliding_window` in a windowed layer. A sequence of L tokens has
    L (L + 1) / 2 pairs, and a pair 2 (size of a key + size of a value) operations per head.

    Args:
        spec: the model.
        lengths: tokens of each sequence, prompt and completion.
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    full = float((sizes * (sizes + 1) / 2).sum())
    width = float(spec.sliding_window)
    over = np.maximum(sizes - width, 0.0)  # queries that see the whole window and no more
    inside = sizes - over
    windowed = float((inside * (inside + 1) / 2 + over * width).sum())
    num_windowed = sum(spec.windowed)
    pairs = (spec.num_layers - num_windowed) * full + num_windowed * windowed
    key_and_value = 2 * spec.head_dim
    if spec.mla is not None:
        key_and_value = spec.mla.nope_dim + spec.mla.rope_dim + spec.mla.v_dim
    return 2.0 * pairs * spec.num_heads * key_and_value


def forward_flops(spec: ModelSpec, lengths: Sequence[float]) -> float:
    """Return the operations of one forward pass over sequences of these lengths, with the head on every token."""
    return 2.0 * weights_per_token(spec).total * float(np.sum(lengths)) + attention_flops(spec, lengths)

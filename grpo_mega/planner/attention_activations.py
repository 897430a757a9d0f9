"""Activation memory of the attention of one layer; the letters are those of planner/activations.py."""

from __future__ import annotations

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.models.spec import MlaSpec, ModelSpec
from grpo_mega.planner.row_shape import PackedRowShape


class AttentionActivations:
    """Bytes that the attention of one layer keeps for its backward pass, on one rank.

    `i` is the number of bytes of an element that a matrix product reads.
    """

    def __init__(self, row: PackedRowShape, spec: ModelSpec, parallel: ParallelConfig) -> None:
        self._row, self._spec, self._parallel = row, spec, parallel
        self._query_heads, self._kv_heads = spec.num_heads / parallel.tp, spec.num_kv_heads / parallel.tp

    def output(self, i: int) -> float:
        """Return the bytes of the core's output, which the output projection keeps as its input."""
        size = self._spec.head_dim if self._spec.mla is None else self._spec.mla.v_dim
        return self._row.tokens * self._query_heads * size * i

    def before_core(self, i: int) -> float:
        """Return the bytes kept between the normalized hidden states and the rotated queries, keys and values.

        The queries, keys and values themselves are counted in `core`.
        """
        if self._spec.mla is not None:
            return self.latents(i) + self._up_projections(self._spec.mla)
        n, m, d, b, t = self._query_heads, self._kv_heads, self._spec.head_dim, self._row.itemsize, self._row.tokens
        if not self._row.local:
            return t * (n + 2 * m) * d * b
        rotary = 4 * t * d * self._spec.rotary_fraction * b
        if not self._spec.qk_norm:
            return rotary
        if b == 4:  # the query is a copy of a part of the projection; keys and values keep the whole projection alive
            return rotary + t * d * (8 * n + 4 * m + 4 * (n + 2 * m)) + 4 * t * (n + m)
        return rotary + 8 * t * d * (n + m) + 4 * t * (n + m)

    def latents(self, i: int) -> float:
        """Return the bytes of the latent vectors of MLA and of their norms; 0 without MLA."""
        mla = self._spec.mla
        if mla is None:
            return 0.0
        q, kv, rope, b = mla.q_rank or 0, mla.kv_rank, mla.rope_dim, self._row.itemsize
        if self._row.local:
            return self._row.tokens * (q * (8 + b) + (kv + rope) * 4 + kv * (4 + b) + 4 * rope * b)
        return self._row.sequence_tokens * ((b + i) * (q + kv) + b * rope)

    def _up_projections(self, mla: MlaSpec) -> float:
        """Return the bytes of the projected keys that are copied; values are views of the projection."""
        return 0.0 if self._row.local else self._row.tokens * self._query_heads * mla.nope_dim * self._row.itemsize

    def core(self) -> float:
        """Return the bytes of rotated queries, keys, values, the output, and what the kernel keeps."""
        n, m, b, t = self._query_heads, self._kv_heads, self._row.itemsize, self._row.tokens
        if self._row.local and self._row.flash:  # its own: one float32 per token and head
            return self.core_inputs_and_output() + 4 * t * n
        if self._spec.mla is not None:
            # Megatron pads values, and so the output, to the width of queries (multi_latent_attention.py:96)
            qk, v = self._spec.mla.nope_dim + self._spec.mla.rope_dim, self._spec.mla.v_dim
            if self._row.local:  # gathered queries, keys, values and output; the output in the order of the row
                return t * n * (5 * qk + v) * b + 4 * t * n
            return t * n * b * 4 * qk + 4 * t * n
        d = self._spec.head_dim
        if not self._row.local:
            return t * d * b * (2 * n + 2 * m) + 4 * t * n
        if self._parallel.cp > 1:
            projection = 0 if self._spec.qk_norm and b == 4 else n + 2 * m
            return t * d * b * (2 * n + m + projection)
        return t * d * b * (4 * n + 2 * m) + 4 * t * n

    def core_inputs_and_output(self) -> float:
        """Return the bytes that stay when the core is recomputed: its inputs and its output."""
        n, m, b, t = self._query_heads, self._kv_heads, self._row.itemsize, self._row.tokens
        if self._spec.mla is not None:
            return t * n * b * 4 * (self._spec.mla.nope_dim + self._spec.mla.rope_dim)
        d = self._spec.head_dim
        if self._row.local and not (self._spec.qk_norm and b == 4):
            return t * d * b * (2 * n + m + n + 2 * m)  # the value is a view that keeps the whole projection alive
        return t * d * b * (2 * n + m + (0 if self._row.local else m))

"""Activation memory of the feed-forward part of one layer; the letters are those of planner/activations.py."""

from __future__ import annotations

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.models.spec import ModelSpec, MoeSpec
from grpo_mega.planner.row_shape import PackedRowShape


class FeedForwardActivations:
    """Bytes that the feed-forward part of one layer keeps for its backward pass, on one rank.

    `i` is the number of bytes of an element that a matrix product reads.

    Args:
        row: tokens of a packed row on this rank.
        spec: the model.
        parallel: its layout.
        imbalance: tokens of the busiest expert-parallel rank, divided by the mean.
        aux_loss: whether routers have an auxiliary loss.
    """

    def __init__(
        self, row: PackedRowShape, spec: ModelSpec, parallel: ParallelConfig, imbalance: float, *, aux_loss: bool
    ) -> None:
        self._row, self._spec, self._parallel, self._imbalance = row, spec, parallel, imbalance
        self._aux_loss = aux_loss

    def dense(self, i: int) -> float:
        """Return the bytes of a dense feed-forward layer."""
        return self._gated_unit(self._spec.ffn_size / self._parallel.tp, i)

    def _gated_unit(self, f: float, i: int) -> float:
        """Return the bytes of [gate; up] and of their product; unfused also of silu(gate) and of a copy of up."""
        kept = 4 if self._row.local else 2
        return f * self._row.tokens * (kept * self._row.itemsize + i)

    def routed_tokens(self, moe: MoeSpec) -> float:
        """Return the number of tokens that the experts of the busiest rank receive."""
        return self._row.sequence_tokens * moe.top_k * self._parallel.etp * self._imbalance

    def experts(self, i: int) -> float:
        """Return the bytes of the routed experts, the shared expert and the router."""
        moe, b = self._spec.moe, self._row.itemsize
        assert moe is not None, "a layer of experts in a model without experts"
        routed = self.routed_tokens(moe)
        kept = 2 if not self._row.local and moe.gate is None else 5  # unfused also the product before the router weight
        per_token = self._spec.hidden_size * i + (kept * b + i) * moe.expert_ffn_size / self._parallel.etp
        scores = 20 if self._aux_loss else 12  # the loss keeps scores and loads in float32
        router = self._row.sequence_tokens * (scores * moe.num_experts + 40 * moe.top_k)
        shared = self._gated_unit(moe.shared_ffn_size / self._parallel.tp, i)
        return routed * (per_token + 8) + router + shared

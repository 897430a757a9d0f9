"""The trained module: Megatron's GPTModel up to the last hidden state, and a head that computes log-probabilities.

The output layer is never called: training never holds the full logits of a row (parallel/vocab_parallel.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_mega.parallel.vocab_parallel import vocab_parallel_log_probs
from grpo_mega.policy.megatron_patches import cpu

cpu.prepare_import()

from megatron.core.models.gpt import GPTModel  # noqa: E402 - only after prepare_import
from megatron.core.tensor_parallel import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)


class PolicyModel(GPTModel):
    """GPTModel whose last stage returns hidden states [T, H] instead of logits."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states  # to the next stage, [T or T/tp, 1, H]
        if self.config.sequence_parallel:
            # each head shard gives a part of the gradient of the hidden state, so the backward pass is a reduce-scatter
            whole: Tensor = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        else:
            whole = copy_to_tensor_model_parallel_region(hidden_states)  # the backward pass is an all-reduce
        return whole.squeeze(1)

    def head_log_probs(
        self, hidden: Tensor, labels: Tensor, *, temperature: float, vocab_size: int
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of labels and entropies, each [T] float32, of softmax(hidden head^T / temperature).

        Args:
            hidden: [T, H] from `forward` of the last stage.
            labels: [T] int64.
            temperature: the sampling temperature.
            vocab_size: without the padding to a multiple of tp.
        """
        return vocab_parallel_log_probs(
            hidden,
            self._head_weight(),
            labels,
            temperature=temperature,
            vocab_size=vocab_size,
            group=self.pg_collection.tp,
        )

    def head_logits(self, hidden: Tensor, *, vocab_size: int) -> Tensor:
        """Return logits [T, V] float32 without gradient on every tensor-parallel rank (for small models)."""
        with torch.no_grad():
            local = hidden.float() @ self._head_weight().float().t()
            whole: Tensor = gather_from_tensor_model_parallel_region(local, group=self.pg_collection.tp)
        return whole[:, :vocab_size]

    def _head_weight(self) -> Tensor:
        weight: Tensor = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        if weight is self.output_layer.weight:
            # The weight is read without a call of its module. The hooks wait for an overlapping parameter gather.
            for hook in self.output_layer._forward_pre_hooks.values():
                hook(self.output_layer, ())
        return weight

"""The critic's module: the policy's architecture with one value per token instead of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_mega.policy.modules.allocation import allocation_device
from grpo_mega.policy.modules.policy_model import PolicyModel

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # isort: skip - after policy.model
from megatron.core.transformer import TransformerConfig  # isort: skip

HEAD = "output_layer.weight"
"""Name of the head among the parameters of the last pipeline stage."""


class ValueHead(torch.nn.Module):
    """v = h . w in float32. w starts at 0, so every value is 0 before the first update, in every layout.

    Every tensor-parallel rank holds all of w. With sequence parallelism each rank has the gradient of its own tokens;
    Megatron sums it for parameters with the attribute `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=allocation_device(config))
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Return values [..., 1] float32 of hidden states [..., H]."""
        return torch.nn.functional.linear(hidden.float(), self.weight.float())


class ValueModel(PolicyModel):
    """GPTModel whose last stage returns values [T] float32. Embedding and head are not tied."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **{**kwargs, "share_embeddings_and_output_weights": False})
        if self.post_process:
            self.output_layer = ValueHead(config)

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        values: Tensor = self.output_layer(hidden_states)
        if self.config.sequence_parallel:
            # the loss is the same on every rank: the backward pass selects the tokens of this rank and sums nothing
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values.view(-1)

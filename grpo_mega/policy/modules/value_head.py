"""The critic's module: the policy's architecture with one number per token in place of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_mega.policy.modules.policy_model import PolicyModel

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # isort: skip - after policy.model
from megatron.core.transformer import TransformerConfig  # isort: skip

HEAD = "output_layer.weight"
"""The head's name among the module's parameters, on the last pipeline stage."""


class ValueHead(torch.nn.Module):
    """v = h . w in float32. It starts at 0: before its first update a critic expects nothing, in every layout.

    Every tensor-parallel rank has all of w. Where they share a row's tokens (sequence parallelism) each sees the
    gradient of its own, which Megatron then adds up for a parameter that is marked so.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., 1] float32."""
        return torch.nn.functional.linear(hidden.float(), self.weight.float())


class ValueModel(PolicyModel):
    """GPTModel whose last stage returns values [T] float32. Embedding and head share nothing."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **{**kwargs, "share_embeddings_and_output_weights": False})
        if self.post_process:
            self.output_layer = ValueHead(config)

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        values: Tensor = self.output_layer(hidden_states)
        if self.config.sequence_parallel:
            # the loss is the same on every rank: backward takes the rank's own tokens, nothing is summed
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values.view(-1)

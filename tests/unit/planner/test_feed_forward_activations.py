"""The bytes that the auxiliary loss of routers adds to a layer of experts are those that its tensors have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpo_mega.planner.activations import Activations
from grpo_mega.policy.modules.router_aux_loss import (
    balance_loss,
    compute_routing_scores_for_aux_loss,
    expert_counts,
    segments_of,
)
from tests.helpers.planner_cases import config_of, inputs_of, spec_of

TOKENS = 256  # of a row of config_of


def kept_bytes(num_experts: int, topk: int, score_function: str) -> int:
    """Return the bytes of float32 that the loss of one row of two rollouts keeps for its backward pass."""
    logits = torch.randn(TOKENS, num_experts, requires_grad=True) * 1
    chosen = torch.zeros(TOKENS, num_experts, dtype=torch.bool).scatter(1, logits.topk(topk).indices, True)
    mask, segments = torch.ones(TOKENS, dtype=torch.bool), segments_of(torch.tensor([0, 100, TOKENS]))
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32 and tensor.dim() > 1 and tensor.size(0) == TOKENS and tensor.size(1) > 1:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        _, scores = compute_routing_scores_for_aux_loss(logits, topk, score_function, padding_mask=~mask)
        loss = balance_loss(scores, expert_counts(chosen, mask, segments, 2), segments, topk, 1.0)
        assert loss.requires_grad
        return sum(kept.values())


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_the_auxiliary_loss_of_routers_is_counted(score_function: str) -> None:
    spec = spec_of("qwen3_moe")
    assert spec.moe is not None
    kept = []
    for coef in (0.0, 0.01):
        config = config_of(algorithm={"aux_loss_coef": coef}, parallel={"recompute": "none"})
        kept.append(Activations(inputs_of(config, spec)).layer(True, False).kept)
    assert kept[1] - kept[0] == kept_bytes(spec.moe.num_experts, spec.moe.top_k, score_function)

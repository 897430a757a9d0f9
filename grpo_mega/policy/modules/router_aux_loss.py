"""The auxiliary loss of routers: a balanced load of the experts within every rollout.

It is the sequence-wise balance loss of DeepSeek-V3, which Megatron calls `seq_aux_loss` (router.py:447). Megatron takes
each row of a microbatch for one sequence, with its padding, so that its loss depends on the layout and on the packing.
Here a sequence is a rollout (prompt and completion) without padding, and the loss of an update is

    coef / rollouts of the update * sum over rollouts and layers of sum_e f_e P_e,
    f_e = E / (K T) * tokens of the rollout that chose expert e,    P_e = mean score of e over the rollout's T tokens,

where the scores of a token add up to 1. With equal scores and an equal load sum_e f_e P_e is 1. As in Megatron, layers
are summed in the loss and averaged in the metric. Only P_e has a gradient; therefore the ranks that share a rollout add
up their counts, and each takes the scores of its own tokens (moe_utils.py:56). With routing replay the counts are those
of the engine's choices. Megatron would count the K largest scores, also where a correction bias or a limit to groups of
experts changes the choice. A pass without gradient (log-probs, the first pass of a recomputed layer) adds nothing.

Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2, equations 17 to 20.
Asserted by tests/parallel/test_router_aux_loss.py and tests/unit/policy/modules/test_router_aux_loss.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.policy.megatron_patches import cpu
from grpo_mega.types import Microbatch

cpu.prepare_import()

from megatron.core.transformer.moe.moe_utils import (  # noqa: E402 - only after prepare_import
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
)

Routing = Callable[..., tuple[Tensor, Tensor]]
"""Megatron's `routing` of a router: (logits, padding mask) -> (weights [T, E], choices [T, E] bool)."""


class RouterBalance:
    """Adds the auxiliary loss to the gradient of these model chunks, and collects its value."""

    def __init__(self, models: Sequence[torch.nn.Module], coef: float, num_layers: int) -> None:
        """Wrap the routers, which must replay choices (`replay_routing`): that gives them the row.

        Args:
            models: the chunks of this rank.
            coef: the coefficient, above 0.
            num_layers: layers with experts of the whole model.
        """
        self._coef, self._num_layers = coef, num_layers
        self._weight = 0.0
        self._losses: list[Tensor] = []
        for model in models:
            for module in model.modules():
                if getattr(module, "router_replay", None) is not None:
                    routing: Any = module.routing
                    module.routing = functools.partial(self._route, module, routing)  # type: ignore[assignment]

    def begin(self, microbatches: Sequence[Microbatch], dp_group: dist.ProcessGroup, device: torch.device) -> None:
        """Start an update: count its rollouts on all data-parallel ranks. Collective."""
        count = torch.tensor(sum(len(m.rollout_ids) for m in microbatches), device=device)
        dist.all_reduce(count, group=dp_group)
        self._weight = self._coef / int(count)
        self._losses = []

    def mean(self, device: torch.device) -> float:
        """Return the loss of the update without its coefficient, mean over rollouts and layers. Collective."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for loss in self._losses:
            total += loss
        dist.all_reduce(total)
        return float(total) / (self._coef * self._num_layers)

    def _route(self, router: Any, routing: Routing, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Call `routing`, and attach the loss of this row to the weights that it returns."""
        weights, chosen = routing(logits, *args, **kwargs)
        if not torch.is_grad_enabled():
            return weights, chosen
        row = router.router_replay.row
        assert row.segments is not None, "rows of an update have segments"
        assert row.token_mask is not None, "rows of an update have a token mask"
        flat = logits.view(-1, logits.size(-1))
        _, scores = compute_routing_scores_for_aux_loss(
            flat, router.topk, router.score_function, padding_mask=~row.token_mask
        )
        counts = expert_counts(chosen, row.token_mask, row.segments, len(row.cu_seqlens_q) - 1)
        if router.tp_cp_group.size() > 1:  # with experts, tensor-parallel ranks route different tokens
            dist.all_reduce(counts, group=router.tp_cp_group)
        loss = balance_loss(scores, counts, row.segments, router.topk, self._weight)
        self._losses.append(loss.detach())
        weights = MoEAuxLossAutoScaler.apply(weights, loss)
        return weights, chosen


def expert_counts(chosen: Tensor, token_mask: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Return [B, E] float32: the tokens of each segment that chose each expert.

    Args:
        chosen: [T, E] bool.
        token_mask: [T] bool, False for padding.
        segments: [T] int64, the segment of each token.
        num_segments: B.
    """
    counts = torch.zeros(num_segments, chosen.size(1), device=chosen.device)
    return counts.index_add_(0, segments, (chosen & token_mask[:, None]).float())


def balance_loss(scores: Tensor, counts: Tensor, segments: Tensor, topk: int, coef: float) -> Tensor:
    """Return coef * sum over segments and experts of f_e P_e, for the tokens of this rank.

    Args:
        scores: [T, E] of the tokens of this rank, which add up to 1 for each token; 0 for padding.
        counts: [B, E] float32, from the tokens of all ranks (`expert_counts`).
        segments: [T] int64.
        topk: K, the experts of a token.
        coef: factor of the loss.
    """
    num_experts = scores.size(1)
    num_tokens = (counts.sum(1) / topk).clamp(min=1)  # a segment of padding has no tokens
    loads = counts / num_tokens[:, None] ** 2
    loss: Tensor = switch_load_balancing_loss_func(
        probs=scores * loads[segments],
        tokens_per_expert=scores.new_ones(num_experts),
        total_num_tokens=1,  # `loads` has the T^2 of each segment
        topk=topk,
        num_experts=num_experts,
        moe_aux_loss_coeff=coef,
    )
    return loss


def segments_of(cu_seqlens: Tensor) -> Tensor:
    """Return [T] int64: the number of the segment of each token of a row."""
    return torch.repeat_interleave(cu_seqlens.diff().long())

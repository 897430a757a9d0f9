"""Experts spread over the ranks of an engine, on CPU: vLLM 0.32 hands its kernel the ids of the whole model.

The kernel (csrc/cpu/cpu_fused_moe.cpp) indexes the experts of this rank with them and reads beyond the last one: wrong
numbers or a segmentation fault. `CPUUnquantizedExperts.apply` is given the map from ids of the model to those of the
rank and drops it; here it is applied first. Can go when vLLM does it.
Asserted by tests/engine/test_weight_sync.py (EP2-to-tp2ep2).
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor


def own_experts(weights: Tensor, ids: Tensor, expert_map: Tensor) -> tuple[Tensor, Tensor]:
    """The picks of a router as one rank computes them; the sum over ranks is the layer's output.

    Args:
        weights: [T, K] of the picked experts.
        ids: [T, K] of the picked experts in the model.
        expert_map: [E] number on this rank, -1 where another rank has the expert.

    Returns:
        Weights that are zero for the experts of other ranks, and numbers on this rank (any valid one for those).
    """
    local = expert_map[ids.long()]
    return weights * (local >= 0), local.clamp(min=0).to(ids.dtype)


def heed_expert_map() -> None:
    """Correct vLLM's experts for CPUs in this process, once."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    apply = CPUUnquantizedExperts.apply
    if hasattr(apply, "__wrapped__"):
        return

    @functools.wraps(apply)
    def mapped(self: Any, *, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, **rest: Any) -> None:
        if expert_map is not None:
            # With weights on the input the kernel would add other ranks' experts unweighted.
            assert not rest["apply_router_weight_on_input"], "weights on the input and experts spread over ranks"
            topk_weights, topk_ids = own_experts(topk_weights, topk_ids, expert_map)
        apply(self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, **rest)

    CPUUnquantizedExperts.apply = mapped

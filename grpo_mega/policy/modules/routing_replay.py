"""Routing replay: the policy's routers use the experts that the engine chose.

Policy and engine compute slightly different router scores. If two scores are close, they may choose different experts,
and their log-probabilities then differ by far more than rounding. With the engine's choices in the microbatch, routers
still compute the weights of the chosen experts from their own scores, with gradient. The policy routes a token without
a recorded choice itself.

The choices are passed to every layer with the row, and a recomputed layer is called again with the same row. If only
the experts are recomputed, the layer is not called again: its choices wait in a queue, because the backward passes of a
pipeline run in the order of the forward passes. Asserted by tests/parallel/test_routing.py.

Source: "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers", arXiv:2510.11370.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_mega.policy.megatron_patches import cpu

cpu.prepare_import()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402 - only after prepare_import


@dataclass
class RowParams(PackedSeqParams):
    """Megatron's description of a packed row, with expert choices [tokens of this rank, L, K] (-1: none).

    `token_mask` [tokens of this rank] is False for padding. `segments` [tokens of this rank] is the number of the
    segment of each token (`cu_seqlens_q`); only the auxiliary loss of routers needs it.
    """

    expert_choices: Tensor | None = None
    token_mask: Tensor | None = None
    segments: Tensor | None = None


class ReplayedRouter:
    """Replacement of the RouterReplay object of one of Megatron's routers (moe_utils.py:702)."""

    def __init__(self, *, experts_recomputed: bool) -> None:
        self._experts_recomputed = experts_recomputed
        self._row: tuple[Tensor | None, RowParams] = (None, RowParams())
        self._waiting: deque[tuple[Tensor | None, RowParams]] = deque()
        self.row = RowParams()
        """The row that the router computes; set by `get_replay_topk`."""

    def begin(self, choices: Tensor | None, row: RowParams) -> None:
        """Set the row that the layer of this router is called with, and the choices [T, K] of this layer."""
        self._row = (choices, row)
        if self._experts_recomputed and torch.is_grad_enabled():
            self._waiting.append(self._row)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return (scores [T, K] of the chosen experts, their indices [T, K]) from the router's `scores` [T, E]."""
        # the first pass of a recomputed module runs without gradient
        is_recomputation = self._experts_recomputed and torch.is_grad_enabled()
        choices, self.row = self._waiting.popleft() if is_recomputation else self._row
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if choices is None:
            return values, own
        choices = choices.to(device=own.device, dtype=own.dtype)
        experts = torch.where(choices >= 0, choices, own)
        return scores.gather(1, experts), experts


def replay_routing(models: Sequence[torch.nn.Module], recompute_modules: Sequence[str]) -> None:
    """Make the routers of these model chunks use the expert choices of a row."""
    for model in models:
        for layer in model.decoder.layers:  # type: ignore[union-attr]
            router = getattr(layer.mlp, "router", None)
            if router is not None:
                router.router_replay = ReplayedRouter(experts_recomputed="moe" in recompute_modules)
                hook = functools.partial(_begin, router.router_replay, layer.layer_number - 1)
                layer.register_forward_pre_hook(hook, with_kwargs=True)


def _begin(router: ReplayedRouter, layer: int, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
    row = kwargs["packed_seq_params"]
    router.begin(None if row.expert_choices is None else row.expert_choices[:, layer], row)

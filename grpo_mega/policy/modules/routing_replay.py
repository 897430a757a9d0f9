"""Routing replay: the engine's choices of experts take the place of those of the policy's routers.

A router of the policy scores experts slightly differently from the engine's, and where two are close it sends a token
elsewhere: the log-probs of the two then differ by far more than rounding. With the engine's choices in the microbatch,
routers keep their own scores, from which the weights of the chosen experts are made, with gradient. A token without a
record is routed by the policy itself.

The choices travel with the row to each layer's call, and a layer that is recomputed is called again with the same row.
Where only the experts are recomputed, the layer is not: its rows wait in order, since a pipeline's backward passes come
in the order of the forward passes. Asserted by tests/parallel/test_routing.py.

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
    """What Megatron gives to each layer of a row, and [T of this rank, L, K] choices of experts (-1: none)."""

    expert_choices: Tensor | None = None


class ReplayedRouter:
    """Stands where one of Megatron's routers looks for its RouterReplay (moe_utils.py:702)."""

    def __init__(self, *, experts_recomputed: bool) -> None:
        self._experts_recomputed = experts_recomputed
        self._choices: Tensor | None = None
        self._waiting: deque[Tensor | None] = deque()

    def begin(self, choices: Tensor | None) -> None:
        """The layer of this router is called for a row; `choices` are [T, K] of it."""
        self._choices = choices
        if self._experts_recomputed and torch.is_grad_enabled():
            self._waiting.append(choices)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """(scores [T, K] of the chosen experts, their numbers [T, K]), from the router's `scores` [T, E]."""
        # a first pass whose activations are not kept runs without gradient
        again = self._experts_recomputed and torch.is_grad_enabled()
        choices = self._waiting.popleft() if again else self._choices
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if choices is None:
            return values, own
        choices = choices.to(device=own.device, dtype=own.dtype)
        experts = torch.where(choices >= 0, choices, own)
        return scores.gather(1, experts), experts


def replay_routing(models: Sequence[torch.nn.Module], recompute_modules: Sequence[str]) -> None:
    """Let the routers of these model chunks follow the choices that come with a row."""
    for model in models:
        for layer in model.decoder.layers:  # type: ignore[union-attr]
            router = getattr(layer.mlp, "router", None)
            if router is not None:
                router.router_replay = ReplayedRouter(experts_recomputed="moe" in recompute_modules)
                hook = functools.partial(_begin, router.router_replay, layer.layer_number - 1)
                layer.register_forward_pre_hook(hook, with_kwargs=True)


def _begin(router: ReplayedRouter, layer: int, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
    choices = kwargs["packed_seq_params"].expert_choices
    router.begin(None if choices is None else choices[:, layer])

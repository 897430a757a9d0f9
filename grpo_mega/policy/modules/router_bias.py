"""Load balancing without an auxiliary loss: every update moves the correction biases of the routers.

After the backward pass Megatron (finalize_model_grads.py, `_update_router_expert_bias`) sums the number of tokens that
each expert computed over all ranks, and moves the bias of each expert by rate * sign(mean load - load). The biases
change only the choice of experts. Megatron's counter includes the padding of packed rows, whose amount depends on the
layout; here padding is not counted, so every layout moves the biases alike. With routing replay the load is that of the
engine's choices. A pass without gradient (log-probs, the first pass of a recomputed layer) counts nothing.

Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2; arXiv:2408.15664, algorithm 1.
Asserted by tests/parallel/test_router_bias.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def move_biases_with_load(config: Any, models: Sequence[torch.nn.Module], rate: float) -> None:
    """Make the routers of these model chunks move their biases at every update; rate 0 leaves them as they are.

    Args:
        config: Megatron's config of the chunks, whose expert bias was switched off after the build.
        models: chunks whose routers replay choices (`replay_routing`), which gives them the token mask of a row.
        rate: the change of a bias per update.
    """
    if rate == 0:
        return
    config.moe_router_enable_expert_bias, config.moe_router_bias_update_rate = True, rate
    for model in models:
        for module in model.modules():
            if getattr(module, "expert_bias", None) is not None:
                module._apply_expert_bias = functools.partial(_count_tokens, module)  # type: ignore[assignment]


def correction_biases(models: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """Yield the routers' correction biases [E] float32, which are buffers and not parameters."""
    for model in models:
        for name, buffer in model.named_buffers():
            if name.endswith(".router.expert_bias"):
                yield buffer


def _count_tokens(router: Any, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
    """Add the tokens of each expert to the router's counter, in place of Megatron's method (router.py:728).

    Args:
        router: Megatron's router.
        routing_map: [T, E] bool.
        padding_mask: Megatron's own, which is not used; the mask of the row is in the router's replay.
    """
    del padding_mask
    if not torch.is_grad_enabled():
        return
    mask = router.router_replay.row.token_mask
    assert mask is not None, "rows of an update have a token mask"
    with torch.no_grad():
        router.local_tokens_per_expert += (routing_map & mask[:, None]).sum(0)

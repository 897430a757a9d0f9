"""Random expert choices for recorded rollouts, and a transformers model whose routers use them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.helpers.family_configs import raw_family_config
from tests.helpers.recorded_rollouts import Recorded

LAYERS, EXPERTS, CHOSEN = 4, 8, 2
# layer 1 is dense: choices are looked up by layer number
REPLAYED_CONFIG = raw_family_config(
    "qwen3_moe", num_hidden_layers=LAYERS, num_experts=EXPERTS, num_experts_per_tok=CHOSEN, mlp_only_layers=[1]
)


def with_choices(recorded: Recorded) -> Recorded:
    """Add random expert choices to all rollouts but the last two; the third and the last token have no choices."""
    generator = torch.Generator().manual_seed(3)
    rollouts = []
    for rollout in recorded.groups.rollouts[:-2]:
        size = (rollout.num_tokens - 1, LAYERS, EXPERTS)
        choices = torch.rand(size, generator=generator).topk(CHOSEN).indices.to(torch.int16)
        choices[2] = -1
        rollouts.append(replace(rollout, completion=replace(rollout.completion, expert_choices=choices)))
    groups = replace(recorded.groups, rollouts=[*rollouts, *recorded.groups.rollouts[-2:]])
    return replace(recorded, groups=groups)


class ReplayingModel:
    """The transformers model with routers that use recorded choices; it is called once per rollout, in order."""

    def __init__(self, model: Any, recorded: Recorded) -> None:
        self.model = model
        self._records = itertools.cycle([r.completion.expert_choices for r in recorded.groups.rollouts])
        self._current: Tensor | None = None
        for layer, block in enumerate(model.model.layers):
            if hasattr(block.mlp, "gate"):
                block.mlp.gate.forward = lambda hidden, gate=block.mlp.gate, layer=layer: self._choose(
                    hidden, gate, layer
                )

    def __call__(self, **arguments: Any) -> Any:
        self._current = next(self._records)
        return self.model(**arguments)

    def _choose(self, hidden: Tensor, gate: Any, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ gate.weight.t()
        chosen = logits.topk(CHOSEN).indices
        if self._current is not None:
            record = torch.full_like(chosen, -1)
            record[: len(self._current)] = self._current[:, layer].long()
            chosen = torch.where(record >= 0, record, chosen)
        return logits, torch.softmax(logits.gather(1, chosen), -1), chosen

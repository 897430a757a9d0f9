"""Collectives of context-parallel attention with known contents, so that one process computes every rank's part."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_mega.parallel.context_parallel import rank_index


class ContextRanks:
    """Stands for the collectives of one rank: gathers what is known of the whole row, and keeps the gradient of it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, cp: int, keys: Tensor, values: Tensor
    ) -> None:
        self.cp, self.row = cp, torch.cat([keys.flatten(1), values.flatten(1)], 1).detach()
        self.grads = torch.zeros_like(self.row)
        self.rank = 0
        monkeypatch.setattr(module, "gather_rows", lambda *_: self.row)
        monkeypatch.setattr(module, "sum_shares", self.keep)

    def keep(self, grads: Tensor, bounds: Tensor, group: Any) -> Tensor:
        """Add the gradient of the whole row, and return this rank's part."""
        del group
        self.grads += grads
        return grads[rank_index(bounds, self.cp, self.rank)]

    @property
    def group(self) -> Any:
        return SimpleNamespace(size=lambda: self.cp, rank=lambda: self.rank)

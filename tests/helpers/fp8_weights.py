"""Named random weights and a source of their slices for the tests of FP8 syncs."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.interfaces import HeldSlice
from grpo_mega.types import TensorSlice

Q, O, DOWN, NORM = "0.q_proj.weight", "0.o_proj.weight", "0.down_proj.weight", "0.input_layernorm.weight"


def weights() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = {Q: (512, 300), O: (300, 512), DOWN: (200, 130), NORM: (300,), "lm_head.weight": (64, 300)}
    made = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    made[Q][128:256, :128] = 0.0  # a block of zeros
    made[O] *= torch.logspace(-6, 6, 512)  # scales of different magnitudes
    return made


class Source:
    def __init__(self, values: dict[str, Tensor], slices: list[tuple[TensorSlice, bool]]) -> None:
        self._values, self._slices = values, slices

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._values.items()}

    def shards(self) -> list[HeldSlice]:
        values = self._values
        return [HeldSlice(hf, tuple(values[hf.name].shape), values[hf.name][hf.index], c) for hf, c in self._slices]

"""Parameter sizes of a model's modules on one rank, which the planner computes memory from.

Pure data. The sizes of the real modules are counted by policy/inspect/module_sizes.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ParameterSize:
    """Name and shape of a parameter as one rank holds it.

    `is_expert` is True for a parameter of a routed expert, which is sharded over the expert axes (ep, etp).
    """

    name: str
    shape: tuple[int, ...]
    is_expert: bool

    @property
    def numel(self) -> int:
        """Number of elements on the rank."""
        return math.prod(self.shape)

    @property
    def is_muon_matrix(self) -> bool:
        """True if Muon would orthogonalize the parameter, as a part of a layer (policy/muon.py)."""
        return len(self.shape) == 2 and min(self.shape) > 1


@dataclass(frozen=True)
class SizeSums:
    """Numbers of elements, summed over some parameters; `largest` is the number of the largest parameter.

    `dense_aligned` and `expert_aligned` round each parameter up to 64 elements, as Megatron's flat buffers do
    (param_and_grad_buffer.py:658). `matrices` counts the parameters that layers multiply with, without routers.
    `dense_vectors` and `expert_vectors` are the aligned elements that Muon leaves to Adam in a layer.
    """

    numel: int
    dense_aligned: int
    expert_aligned: int
    matrices: int
    largest: int
    dense_vectors: int
    expert_vectors: int
    largest_dense_matrix: int
    largest_expert_matrix: int

    @classmethod
    def of(cls, parameters: Sequence[ParameterSize]) -> SizeSums:
        """Sum the sizes of `parameters`."""
        aligned = {kind: sum(_aligned(p) for p in parameters if p.is_expert == kind) for kind in (0, 1)}
        vectors = [p for p in parameters if not p.is_muon_matrix]
        left = {kind: sum(_aligned(p) for p in vectors if p.is_expert == kind) for kind in (0, 1)}
        muon = [p for p in parameters if p.is_muon_matrix]
        widest = {kind: max((p.numel for p in muon if p.is_expert == kind), default=0) for kind in (0, 1)}
        matrices = sum(p.numel for p in parameters if len(p.shape) > 1 and ".router." not in p.name)
        return cls(
            sum(p.numel for p in parameters),
            aligned[0],
            aligned[1],
            matrices,
            max((p.numel for p in parameters), default=0),
            left[0],
            left[1],
            widest[0],
            widest[1],
        )


def _aligned(parameter: ParameterSize) -> int:
    return -(-parameter.numel // 64) * 64


@dataclass(frozen=True)
class ModuleSizes:
    """Parameters of the policy's modules on one rank of the tensor and expert axes.

    A pipeline stage consists of some of these modules. `moe_layer` and `dense_layer` are empty if the model has no such
    layer.
    """

    embedding: tuple[ParameterSize, ...]
    dense_layer: tuple[ParameterSize, ...]
    moe_layer: tuple[ParameterSize, ...]
    final_norm: tuple[ParameterSize, ...]
    head: tuple[ParameterSize, ...]
    """Parameters of an untied head. A tied head on another stage than the embedding is a copy of the embedding."""

    @functools.cached_property
    def sums(self) -> dict[str, SizeSums]:
        """Field name -> sums over its parameters. Cached, because a layer of many experts has hundreds."""
        return {field.name: SizeSums.of(getattr(self, field.name)) for field in dataclasses.fields(self)}


class ModuleCounter(Protocol):
    """Function that returns the sizes of the real modules for a layout of the axes tp, ep and etp.

    It allocates no parameter memory.
    """

    def __call__(self, *, tp: int, ep: int, etp: int) -> ModuleSizes:
        """Return the module sizes on one rank of this layout."""
        ...

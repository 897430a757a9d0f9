"""Slices of a checkpoint that each rank of a policy will hold, computed without a model and without ranks.

The tables and the numbering are those of the policy (`policy/weight_source.py`). A running job uses the slices of the
policy itself; these are for the plan of a job that is not running.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.models.parameter_tables import parameter_names, parameter_placements
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.pipeline_split import stage_layers
from grpo_mega.parallel.topology import Coordinates, Topology
from grpo_mega.types import TensorSlice

_EMBEDDING, _LAST, _SHARED = -1, -2, -1
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def policy_slices(
    spec: ModelSpec, parallel: ParallelConfig, topology: Topology, at: Coordinates, *, latent_split: bool
) -> list[TensorSlice]:
    """Return all slices on one rank, each once; the first and the last stage both hold a tied embedding.

    Args:
        spec: the model.
        parallel: gives the layers of each pipeline stage.
        topology: the ranks.
        at: the coordinates of the rank.
        latent_split: see `latent_attention` in models/layer_tables.py.
    """
    found: dict[TensorSlice, None] = {}
    for name in _names_of_rank(spec, parallel, topology, at):
        pieces = parameter_placements(spec, name, topology, at, latent_split=latent_split)
        found.update(dict.fromkeys(piece.hf for piece in pieces))
    return list(found)


def _names_of_rank(spec: ModelSpec, parallel: ParallelConfig, topology: Topology, at: Coordinates) -> Iterator[str]:
    """Yield the parameters of a rank, with layers and experts numbered through the whole model."""
    names = _names(spec)
    experts_per_rank = spec.moe.num_experts // topology.ep if spec.moe is not None else 0
    if at.pp_rank == 0:
        yield from names[_EMBEDDING, _SHARED]
    for stage in stage_layers(spec.num_layers, parallel, "the model")[at.pp_rank :: topology.pp]:
        for layer in stage:
            yield from names[layer, _SHARED]
            for expert in range(at.ep_rank * experts_per_rank, (at.ep_rank + 1) * experts_per_rank):
                yield from names.get((layer, expert), ())
    if at.pp_rank == topology.pp - 1:
        yield from names[_LAST, _SHARED]


@functools.lru_cache(maxsize=2)
def _names(spec: ModelSpec) -> dict[tuple[int, int], list[str]]:
    """Return (layer or end of the model, expert or _SHARED) -> names of parameters."""
    found: dict[tuple[int, int], list[str]] = {(_EMBEDDING, _SHARED): [], (_LAST, _SHARED): []}
    for name in parameter_names(spec):
        parts = name.split(".")
        if parts[0] == "embedding":
            key = (_EMBEDDING, _SHARED)
        elif parts[1] != "layers":
            key = (_LAST, _SHARED)
        elif ".experts.linear_fc" in name:  # Transformer Engine's name of the same tensor
            continue
        else:
            expert = _EXPERT.search(name)
            key = (int(parts[2]), int(expert[1]) if expert else _SHARED)
        found.setdefault(key, []).append(name)
    return found

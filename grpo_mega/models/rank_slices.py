"""Which slices of a checkpoint each rank of a policy holds, by arithmetic: no model is built, no rank runs.

The same tables and the same numbering as the policy itself (`policy/weight_source.py`), which has the last word: a plan
made of these is for a job that does not run yet.
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
    """All slices on one rank, each once; a tied embedding is held by the first stage and by the last.

    Args:
        spec: the model.
        parallel: how layers are laid out over stages.
        topology: the ranks.
        at: which of them.
        latent_split: see `convert.families_layers.latent_attention`.
    """
    found: dict[TensorSlice, None] = {}
    for name in _names_of_rank(spec, parallel, topology, at):
        pieces = parameter_placements(spec, name, topology, at, latent_split=latent_split)
        found.update(dict.fromkeys(piece.hf for piece in pieces))
    return list(found)


def _names_of_rank(spec: ModelSpec, parallel: ParallelConfig, topology: Topology, at: Coordinates) -> Iterator[str]:
    """Megatron's parameters, layers and experts numbered from the model's first."""
    names = _names(spec)
    mine = spec.moe.num_experts // topology.ep if spec.moe is not None else 0
    if at.pp_rank == 0:
        yield from names[_EMBEDDING, _SHARED]
    for stage in stage_layers(spec.num_layers, parallel, "the model")[at.pp_rank :: topology.pp]:
        for layer in stage:
            yield from names[layer, _SHARED]
            for expert in range(at.ep_rank * mine, (at.ep_rank + 1) * mine):
                yield from names.get((layer, expert), ())
    if at.pp_rank == topology.pp - 1:
        yield from names[_LAST, _SHARED]


@functools.lru_cache(maxsize=2)
def _names(spec: ModelSpec) -> dict[tuple[int, int], list[str]]:
    """(layer or end of the model, expert or _SHARED) -> names of parameters."""
    found: dict[tuple[int, int], list[str]] = {(_EMBEDDING, _SHARED): [], (_LAST, _SHARED): []}
    for name in parameter_names(spec):
        parts = name.split(".")
        if parts[0] == "embedding":
            key = (_EMBEDDING, _SHARED)
        elif parts[1] != "layers":
            key = (_LAST, _SHARED)
        elif ".experts.linear_fc" in name:  # Transformer Engine's name of an expert, the same tensor
            continue
        else:
            expert = _EXPERT.search(name)
            key = (int(parts[2]), int(expert[1]) if expert else _SHARED)
        found.setdefault(key, []).append(name)
    return found

"""A reward whose module makes the engine of the last rank wrong after every verification of a weight sync.

`engines.weights.sink.RegionSink.digests` returns the digests of the right weights, and changes the memory then. The
variable WRONG_ENGINE says how:

- `final_norm` (default): the final norm times 3
- `embedding_row`: row 5 of the embedding is row 6
- `layer_norm`: the input norm of layer 1 times 1.1
- `layer_norm_ones`: the input norm of layer 1 is all ones, to which trained values are close
- `heads`: the first two query heads of layer 1, of 32 rows each, are swapped
- `stale_layer`: layer 1 keeps the weights of the first sync; right at the first step

Later calls for the same weights return the same digests, as if the kernels computed another function. With
WRONG_ENGINE_SHOWN=1 they return those of the changed memory. `python -m tests.helpers.wrong_engine ARGUMENTS` is an
engine server (`python -m grpo_mega.serve`) with this fault.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from grpo_mega.engines.weights.sink import RegionSink
from grpo_mega.rewards.base import reward
from grpo_mega.rewards.builtin.exact import exact
from grpo_mega.types import TensorSlice

__all__ = ["exact", "length"]  # rewards: the quickstart's, and one that needs no right answers

_digests = RegionSink.digests
_first: dict[str, torch.Tensor] = {}
_answers: dict[object, list[int]] = {}


def _change(kind: str, name: str, memory: torch.Tensor) -> None:
    match kind, name:
        case "final_norm", "model.norm.weight":
            memory.mul_(3)
        case "embedding_row", "model.embed_tokens.weight":
            memory[5] = memory[6]
        case "layer_norm", "model.layers.1.input_layernorm.weight":
            memory.mul_(1.1)
        case "layer_norm_ones", "model.layers.1.input_layernorm.weight":
            memory.fill_(1)
        case "heads", "model.layers.1.self_attn.q_proj.weight":
            memory[:64] = torch.cat((memory[32:64], memory[:32]))
        case "stale_layer", _ if name.startswith("model.layers.1."):
            memory.copy_(_first.setdefault(name, memory.clone()))


def _change_after(sink: RegionSink, slices: Sequence[TensorSlice]) -> list[int]:
    key = sink.policy_version, tuple(slices)
    if key in _answers and os.environ.get("WRONG_ENGINE_SHOWN") != "1":
        return _answers[key]
    found = _answers[key] = _digests(sink, slices)
    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        for region in sink.layout():
            hf = region.placement.hf
            memory = sink._regions.memory_of(region, hf)
            if memory is not None:
                _change(os.environ.get("WRONG_ENGINE", "final_norm"), hf.name, memory)
    return found


RegionSink.digests = _change_after  # type: ignore[method-assign]


@reward(low=0.0, high=1.0)
def length(prompt: str, completion: str, reference: str) -> float:
    """Return 1 for an odd number of characters."""
    del prompt, reference
    return float(len(completion) % 2)


if __name__ == "__main__":
    from grpo_mega.serve import main

    main()

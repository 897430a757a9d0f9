"""A reward whose module makes the engine of the last rank wrong after every verification of a weight sync.

`engines.weights.sink.RegionSink.digests` returns the digests of the right weights, and changes the final norm then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from grpo_mega.engines.weights.sink import RegionSink
from grpo_mega.rewards.base import reward
from grpo_mega.types import TensorSlice

_digests = RegionSink.digests


def _change_after(sink: RegionSink, slices: Sequence[TensorSlice]) -> list[int]:
    found = _digests(sink, slices)
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        for region in sink.layout():
            hf = region.placement.hf
            if hf.name == "model.norm.weight":
                memory = sink._regions.memory_of(region, hf)
                assert memory is not None, "the norm is a plain parameter"
                memory.mul_(3)
    return found


RegionSink.digests = _change_after  # type: ignore[method-assign]


@reward(low=0.0, high=1.0)
def length(prompt: str, completion: str, reference: str) -> float:
    """Return 1 for an odd number of characters."""
    del prompt, reference
    return float(len(completion) % 2)

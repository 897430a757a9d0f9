"""Copies of attention sinks in float32, which some attention backends of vLLM read in place of the parameter.

FlashInfer (v1/attention/backends/flashinfer.py:1963, chosen for gpt-oss on Blackwell) and b12x keep such a copy, make
it after loading, and write it again only in the same step. It is neither a parameter nor a buffer, so a sleeping engine
loses it and a weight sync does not reach it.
Asserted by tests/unit/engines/vllm/test_attention_sinks.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class SinkCopy:
    """A copy of attention sinks, [H] float32, and the parameter that it is computed from, [H] in the engine's dtype."""

    parameter: str
    backend: Any
    """vLLM's `AttentionImpl` of the layer."""

    def rebuild(self) -> None:
        """Run vLLM's own step after loading, which writes the copy in place: CUDA graphs hold its address."""
        self.backend.process_weights_after_loading(self.backend._sinks_source.dtype)

    def difference(self) -> str | None:
        """Return how many elements of the copy differ from the present parameter; None if none does."""
        expected: Tensor = self.backend._sinks_source.detach().float()
        different = int((self.backend.sinks != expected).sum())
        return f"{different} of {expected.numel()} attention sinks differ from the parameter" if different else None


def sink_copies(model: nn.Module) -> list[SinkCopy]:
    """Return one entry for each layer of attention that reads a copy of its sinks.

    Raises:
        RuntimeError: a backend reads other sinks than the parameter, and is not known to write them again.
    """
    names = {parameter.data_ptr(): name for name, parameter in model.named_parameters() if parameter.numel()}
    found = []
    for name, module in model.named_modules():
        backend = getattr(module, "impl", None)
        sinks = getattr(backend, "sinks", None)
        if not isinstance(sinks, torch.Tensor) or sinks.data_ptr() in names:
            continue
        source = getattr(backend, "_sinks_source", None)
        if not isinstance(source, torch.Tensor) or source.data_ptr() not in names:
            raise RuntimeError(
                f"{type(backend).__name__} of {name} computes with a copy of its attention sinks that no sync can write"
            )
        found.append(SinkCopy(names[source.data_ptr()], backend))
    return found

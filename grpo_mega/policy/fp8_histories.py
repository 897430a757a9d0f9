"""Restores the state of FP8's delayed scaling recipe when an update is skipped.

The passes that compute a gradient add their largest values to `amax_history`, and set the scales of the next pass from
it. A value that is not finite stays in a history of 1,024 passes, and Transformer Engine does not change a scale while
the largest value of the history is not finite (2.x, quantization.py: `_default_sf_compute`). A skipped update therefore
restores both, so that the next pass computes as if the skipped passes had not been made.
Asserted by tests/unit/policy/test_fp8_histories.py. Not yet verified on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_PARTS = ("scaling_fwd", "scaling_bwd")


class Fp8Histories:
    """Copies of the amax histories [H, tensors] and the scales [tensors] of all layers, from before a gradient."""

    def __init__(self, model: Iterable[torch.nn.Module]) -> None:
        """Copy the state of the layers of `model`, on their device: 4 bytes per tensor and history entry."""
        self._model = tuple(model)
        self._kept = {key: (state.amax_history.clone(), state.scale.clone()) for key, state in self._states()}

    def restore(self) -> None:
        """Write the copies back. A state that did not exist before gets its initial values: zeros, and scales of 1."""
        for key, state in self._states():
            history, scale = self._kept.get(key, (None, None))
            with torch.no_grad():
                _set(state.amax_history, history, 0.0)
                _set(state.scale, scale, 1.0)

    def _states(self) -> Iterator[tuple[tuple[int, int, str], Any]]:
        for chunk, network in enumerate(self._model):
            for number, module in enumerate(network.modules()):
                for part in _PARTS:
                    state = getattr(module, "fp8_meta", {}).get(part)
                    if hasattr(state, "amax_history"):
                        yield (chunk, number, part), state


def _set(tensor: Tensor, kept: Tensor | None, initial: float) -> None:
    """Set a tensor in place: Transformer Engine holds views of it."""
    if kept is None or kept.shape != tensor.shape:
        tensor.fill_(initial)
    else:
        tensor.copy_(kept)

"""Properties of the kinds of transports, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TransportKind = Literal["auto", "gloo", "nccl", "shared_memory", "cuda_ipc"]


@dataclass(frozen=True)
class TransportProperties:
    """Properties that are the same for every instance of a transport.

    Args:
        on_device: buffers are in GPU memory, so the transport needs CUDA; otherwise they are in host memory.
        has_segment: senders pack into memory that receivers map; a machine has at most one such transport.
        sends_in_place: large pieces are sent from, and received into, parameter memory without a copy to a buffer.
    """

    on_device: bool
    has_segment: bool
    sends_in_place: bool


TRANSPORTS = {
    "gloo": TransportProperties(on_device=False, has_segment=False, sends_in_place=True),
    "nccl": TransportProperties(on_device=True, has_segment=False, sends_in_place=False),
    "shared_memory": TransportProperties(on_device=False, has_segment=True, sends_in_place=False),
    "cuda_ipc": TransportProperties(on_device=True, has_segment=True, sends_in_place=False),
}

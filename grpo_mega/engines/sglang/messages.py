"""Messages between a rank and its SGLang process. Imports no other module of this program: both sides load it first."""

from __future__ import annotations

import io
import math
import pickle
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class HostSettings:
    """Settings of the SGLang process, which are sent to it first."""

    arguments: dict[str, Any]
    """Keyword arguments of SGLang's Engine."""
    answers: Path
    """Folder through which the schedulers answer."""
    tp: int
    idle_seconds: float
    """Limit for the schedulers to become idle after the last completion."""


@dataclass(frozen=True)
class SamplingBatch:
    """Requests that SGLang receives in one message. The sampled tokens depend only on them and on `seed`."""

    prompts: Sequence[Sequence[int]]
    parameters: Sequence[dict[str, Any]]
    """SGLang's sampling parameters, one dictionary per request."""
    seed: int
    keep_prefixes: bool
    """Keep the prefix cache of the previous batch."""
    expert_choices: bool
    """Return the experts of every token."""


@dataclass(frozen=True)
class Sampled:
    """Result of the completed request at `position` of its batch."""

    position: int
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: dict[str, Any]
    """SGLang's `finish_reason`."""
    expert_choices: bytes | None
    """int32 [N, L, K]: N tokens of prompt and completion without the last, L layers, K experts."""


def set_timeouts(connection: socket.socket, seconds: float) -> None:
    """Set send and receive timeouts; an operation that exceeds its timeout raises BlockingIOError."""
    limit = struct.pack("@ll", math.ceil(seconds), 0)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, limit)


def pickled_tensors(tensors: Sequence[tuple[str, Any]]) -> bytes:
    """Return the pickle of (name, tensor) pairs; the values are part of it.

    Its storages name torch's own function. Megatron (core/__init__.py) puts another one in its place for the whole
    process, which SGLang's schedulers reject, and whose import would bring Megatron into SGLang's process.
    """
    import torch.storage

    present = torch.storage._load_from_bytes
    torch.storage._load_from_bytes = _load_from_bytes
    try:
        return pickle.dumps(list(tensors))
    finally:
        torch.storage._load_from_bytes = present


def _load_from_bytes(data: bytes) -> Any:
    """Load a storage as torch.storage._load_from_bytes does, whose name it has in a pickle."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


_load_from_bytes.__module__ = "torch.storage"

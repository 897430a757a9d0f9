"""What a rank and the process of its SGLang say to each other. Imports nothing: both sides need it before all else."""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class HostSettings:
    """`arguments` of SGLang's Engine; `answers`: the folder through which its schedulers answer."""

    arguments: dict[str, Any]
    answers: Path
    tp: int


@dataclass(frozen=True)
class SamplingBatch:
    """Requests that SGLang gets in one message: what follows is decided by them and `seed` alone. `stop` of each.
    `expert_choices`: tell the experts of every token."""

    prompts: Sequence[Sequence[int]]
    parameters: Sequence[dict[str, Any]]
    seed: int
    keep_prefixes: bool
    expert_choices: bool


@dataclass(frozen=True)
class Sampled:
    """The request at this position is complete. `finish`: SGLang's finish_reason. `expert_choices`: int32, of the N
    tokens of prompt and answer but the last, of L layers, K experts each, one after another."""

    position: int
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: dict[str, Any]
    expert_choices: bytes | None


def with_limit(end: socket.socket, seconds: float) -> None:
    """A message whose other end stands still is a BlockingIOError after that time."""
    limit = struct.pack("@ll", math.ceil(seconds), 0)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, limit)

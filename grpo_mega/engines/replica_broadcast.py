"""What the first rank of an engine hears from another process, all of its ranks hear, in the same order.

The process is SGLang's beside the ranks, an engine server elsewhere, or, in a server, the job that it serves.

Asserted by tests/parallel/test_engine_ranks.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from grpo_mega.types import UserError

_MOST_BEAT_SECONDS = 10.0


class ReplicaBroadcast:
    """The ranks of this engine."""

    def __init__(self, tp: int, timeout_seconds: float) -> None:
        """Collective over all ranks of the job."""
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % tp:
            raise UserError(f"engine.tp={tp} does not divide the {world} ranks of the job", remedy="use a divisor")
        groups = [dist.new_group(list(range(first, first + tp))) for first in range(0, world, tp)]
        self.number = rank % tp
        self.is_first = self.number == 0
        self.beat_seconds = min(_MOST_BEAT_SECONDS, timeout_seconds / 4)
        self._source, self._group = rank - self.number, groups[rank // tp] if tp > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """Of every rank of the engine, in their order."""
        if self._group is None:
            return [value]
        told = [None] * self._group.size()
        dist.all_gather_object(told, value, group=self._group)
        return told

    def broadcast_last(self, told: Iterator[Any]) -> Any:
        """The last value of the first rank's iterator, on all ranks."""
        last = None
        for value in self.broadcast_stream(told):
            last = value
        return last

    def broadcast_stream(self, told: Iterator[Any]) -> Iterator[Any]:
        """What the first rank is told, on all ranks; None is a sign of life only.

        Raises:
            RuntimeError: on all ranks, what the first one's iterator raised.
        """
        if self._group is None:
            yield from (value for value in told if value is not None)
            return
        kind = "part"
        while kind == "part":
            kind, value = self._broadcast(self._next(told) if self.is_first else None)
            if kind == "failed":
                raise RuntimeError(value)
            if kind == "part" and value is not None:
                yield value

    def _next(self, told: Iterator[Any]) -> tuple[str, Any]:
        try:
            return "part", next(told)
        except StopIteration:
            return "end", None
        except RuntimeError as error:  # the other ranks of the engine would wait in vain
            return "failed", str(error)

    def _broadcast(self, message: tuple[str, Any] | None) -> tuple[str, Any]:
        box = [message]
        dist.broadcast_object_list(box, src=self._source, group=self._group)
        assert box[0] is not None, "the first rank said something"
        return box[0]

"""Broadcast of messages that the first rank of a replica receives from another process to all ranks, in order.

The other process is SGLang's beside the ranks, an engine server, or, inside a server, the job that it serves.

Asserted by tests/parallel/test_engine_ranks.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from grpo_mega.types import UserError

_LONGEST_BEAT_SECONDS = 10.0


class ReplicaBroadcast:
    """The ranks of this replica. The first of them receives messages and broadcasts them to the others."""

    def __init__(self, tp: int, timeout_seconds: float) -> None:
        """Create the process groups of all replicas. Collective over all ranks of the job."""
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % tp:
            raise UserError(
                f"engine.tp={tp} does not divide the {world} ranks of the job",
                remedy="use a divisor of the number of ranks",
            )
        groups = [dist.new_group(list(range(first, first + tp))) for first in range(0, world, tp)]
        self.number = rank % tp
        self.is_first = self.number == 0
        self.beat_seconds = min(_LONGEST_BEAT_SECONDS, timeout_seconds / 4)
        self._source, self._group = rank - self.number, groups[rank // tp] if tp > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks of the replica, in rank order."""
        if self._group is None:
            return [value]
        values = [None] * self._group.size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast_last(self, messages: Iterator[Any]) -> Any:
        """Return the last value of the first rank's iterator on all ranks; None if it is empty."""
        last = None
        for value in self.broadcast_stream(messages):
            last = value
        return last

    def broadcast_stream(self, messages: Iterator[Any]) -> Iterator[Any]:
        """Yield the values of the first rank's iterator on all ranks; None is a heartbeat and is not yielded.

        Raises:
            RuntimeError: on all ranks, if the first rank's iterator raised it.
        """
        if self._group is None:
            yield from (value for value in messages if value is not None)
            return
        kind = "part"
        while kind == "part":
            kind, value = self._broadcast(self._next(messages) if self.is_first else None)
            if kind == "failed":
                raise RuntimeError(value)
            if kind == "part" and value is not None:
                yield value

    def _next(self, messages: Iterator[Any]) -> tuple[str, Any]:
        try:
            return "part", next(messages)
        except StopIteration:
            return "end", None
        except RuntimeError as error:  # the other ranks of the replica wait for a message
            return "failed", str(error)

    def _broadcast(self, message: tuple[str, Any] | None) -> tuple[str, Any]:
        shared = [message]
        dist.broadcast_object_list(shared, src=self._source, group=self._group)
        assert shared[0] is not None, "the first rank sends a message"
        return shared[0]

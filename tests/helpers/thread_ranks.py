"""Ranks as threads of one process, with the collectives on arrays that real ranks have."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from grpo_mega.data.rollout_table import RolloutTable
from grpo_mega.data.rollout_tokens import RolloutTokens
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.trainer.rollout_transfer import RolloutTransfer

T = TypeVar("T")


class ThreadCollectives(ArrayCollectives):
    """Collectives between the threads that have the same board."""

    def __init__(self, topology: Topology, rank: int, board: dict[int, Any], barrier: threading.Barrier) -> None:
        self.ranks = Ranks(topology, topology.coordinates(rank), torch.device("cpu"))
        self.world_size = topology.world_size
        self._board, self._barrier = board, barrier

    def _everyone(self, value: Any) -> dict[int, Any]:
        self._board[self.ranks.rank] = value
        self._barrier.wait(30)
        values = dict(self._board)
        self._barrier.wait(30)
        return values

    def sum(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.sum(list(self._everyone(np.array(array, dtype=np.float64)).values()), axis=0)

    def move(
        self, values: NDArray[Any], counts: NDArray[np.int64], source: NDArray[np.int64], target: NDArray[np.int64]
    ) -> NDArray[Any]:
        assert len(values) == counts[source == self.ranks.rank].sum()
        every = self._everyone(values)
        parts = [values[:0]]
        for row in np.flatnonzero(target == self.ranks.rank):
            begin = counts[:row][source[:row] == source[row]].sum()
            parts.append(every[int(source[row])][begin : begin + counts[row]])
        return np.concatenate(parts)

    def share_in_replica(self, values: NDArray[Any], size: int, *, from_loss_rank: bool) -> NDArray[Any]:
        topology, dp_rank = self.ranks.topology, self.ranks.at.dp_rank
        sender = topology.loss_rank(dp_rank) if from_loss_rank else topology.first_rank(dp_rank)
        found: NDArray[Any] = self._everyone(values)[sender]
        assert len(found) == size
        return found


def on_ranks(topology: Topology, function: Callable[[RolloutTransfer], T]) -> list[T]:
    """Run `function` on every rank and return the results in the order of the ranks."""
    board: dict[int, Any] = {}
    barrier = threading.Barrier(topology.world_size)

    def run(rank: int) -> T:
        try:
            return function(RolloutTransfer(ThreadCollectives(topology, rank, board, barrier)))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(topology.world_size) as pool:
        return list(pool.map(run, range(topology.world_size)))


def one_rank() -> RolloutTransfer:
    """Return the transfers of the only rank of a job."""
    topology = Topology(1)
    return RolloutTransfer(ArrayCollectives(Ranks(topology, topology.coordinates(0), torch.device("cpu"))))


class ReplicatedTransfer(RolloutTransfer):
    """Transfers of a rank that, like all others, has the tokens of the whole step; nothing is sent."""

    def to_trainers(self, tokens: RolloutTokens, table: RolloutTable, trainer: NDArray[np.int64]) -> RolloutTokens:
        return tokens.select(trainer == self.ranks.at.dp_rank)


def replicated(ranks: Ranks) -> RolloutTransfer:
    """Return the transfers of a rank that has the tokens of the whole step."""
    collectives = ArrayCollectives.__new__(ArrayCollectives)  # without process groups
    collectives.ranks, collectives.world_size, collectives._replica_group = ranks, 1, None
    return ReplicatedTransfer(collectives)

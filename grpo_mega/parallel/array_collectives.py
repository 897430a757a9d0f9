"""Collectives on numpy arrays over the ranks of a job, in host memory, for the columns of rollouts.

Nothing is pickled, and the size of everything received is known beforehand: the receivers compute it from the table
that all ranks have. With one rank every function returns what it gets.
Asserted by tests/parallel/test_rollout_transfer.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from grpo_mega.parallel.ranks import Ranks

_Ints = NDArray[np.integer[Any]]


class ArrayCollectives:
    """Collectives of this rank. Construction is collective: it creates a process group per data-parallel replica."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.world_size = ranks.topology.world_size
        self._replica_group: dist.ProcessGroup | None = None
        topology = ranks.topology
        if topology.tp * topology.cp * topology.pp > 1:
            members: dict[int, list[int]] = {}
            for rank in range(self.world_size):
                members.setdefault(topology.coordinates(rank).dp_rank, []).append(rank)
            groups = {dp_rank: dist.new_group(of_replica, backend="gloo") for dp_rank, of_replica in members.items()}
            self._replica_group = groups[ranks.at.dp_rank]

    def sum(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum over all ranks. Exact, and the same for every layout, where one rank has an entry."""
        if self.world_size == 1:
            return array
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64).copy())
        dist.all_reduce(tensor)
        return tensor.numpy()

    def gather(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return [world_size, ...]: the arrays of all ranks, which have one shape."""
        every = np.zeros((self.world_size, *values.shape))
        every[self.ranks.rank] = values
        return self.sum(every)

    def gather_losses(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return [dp, ...]: the arrays of one rank of each data-parallel replica (`Topology.loss_rank`)."""
        topology = self.ranks.topology
        return self.gather(values)[[topology.loss_rank(dp_rank) for dp_rank in range(topology.dp)]]

    def move(self, values: NDArray[Any], counts: _Ints, source: _Ints, target: _Ints) -> NDArray[Any]:
        """Send the entries of each rollout from the rank that has them to another rank. Collective: one all-to-all.

        Args:
            values: entries of the rollouts whose source is this rank, in ascending order of the rollouts. All ranks
                have the same dtype and the same dimensions behind the first.
            counts: [R] number of entries of each rollout of the step.
            source: [R] rank that has the rollout.
            target: [R] rank that needs the rollout.

        Returns:
            The entries of the rollouts whose target is this rank, in ascending order of the rollouts.
        """
        own = np.flatnonzero(source == self.ranks.rank)
        assert len(values) == counts[own].sum(), f"{len(values)} entries of rollouts with {counts[own].sum()}"
        if self.world_size == 1:
            return values
        wanted = np.flatnonzero(target == self.ranks.rank)
        order = np.argsort(target[own], kind="stable")  # by target, then by rollout
        sizes = [_bytes_per_rank(peers, counts[ids], values, self.world_size)
                 for peers, ids in ((target[own], own), (source[wanted], wanted))]  # fmt: skip
        received = self._all_to_all(_as_bytes(_take(values, counts[own], order)), sizes[0], sizes[1])
        arrived = np.argsort(source[wanted], kind="stable")  # by source, then by rollout
        entries = received.numpy().view(values.dtype).reshape(-1, *values.shape[1:])
        return _take(entries, counts[wanted][arrived], np.argsort(arrived, kind="stable"))

    def _all_to_all(self, sent: torch.Tensor, sizes: list[int], received_sizes: list[int]) -> torch.Tensor:
        """Send `sizes[rank]` bytes to every rank; return what they sent, in the order of the ranks."""
        received = torch.empty(sum(received_sizes), dtype=torch.uint8)
        dist.all_to_all_single(received, sent, received_sizes, sizes)
        return received

    def share_in_replica(self, values: NDArray[Any], size: int, *, from_loss_rank: bool) -> NDArray[Any]:
        """Broadcast within the tp x cp x pp ranks of a data-parallel replica. Collective.

        Args:
            values: on the sender, `size` entries; on the other ranks only dtype and further dimensions are read.
            size: number of entries, known on all ranks.
            from_loss_rank: the sender is `Topology.loss_rank`; otherwise it is the first rank of the replica.
        """
        if self._replica_group is None:
            return values
        topology, dp_rank = self.ranks.topology, self.ranks.at.dp_rank
        sender = topology.loss_rank(dp_rank) if from_loss_rank else topology.first_rank(dp_rank)
        if self.ranks.rank == sender:
            assert len(values) == size, f"{len(values)} entries, {size} expected"
            buffer = np.ascontiguousarray(values)
        else:
            buffer = np.empty((size, *values.shape[1:]), dtype=values.dtype)
        if buffer.nbytes:
            dist.broadcast(_as_bytes(buffer), src=sender, group=self._replica_group)
        return buffer


def _as_bytes(values: NDArray[Any]) -> torch.Tensor:
    """Return the memory of the array, which stays shared, as [bytes] uint8."""
    return torch.from_numpy(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def _take(values: NDArray[Any], counts: _Ints, order: _Ints) -> NDArray[Any]:
    """Return the entries of ragged rows in another order of the rows. A row is copied as a whole."""
    ends = np.cumsum(counts)
    starts, ends = (ends - counts)[order].tolist(), ends[order].tolist()
    return np.concatenate([values[:0], *(values[begin:end] for begin, end in zip(starts, ends, strict=True))])


def _bytes_per_rank(peers: _Ints, counts: _Ints, values: NDArray[Any], world_size: int) -> list[int]:
    entry = values.dtype.itemsize * int(np.prod(values.shape[1:], dtype=np.int64))
    totals = np.zeros(world_size, dtype=np.int64)
    np.add.at(totals, peers, counts)
    return (totals * entry).tolist()

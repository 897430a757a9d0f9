"""Moves the columns of rollouts between the ranks that sampled them and the ranks that train them.

The first rank of a prompt shard has what the shard sampled. One all-to-all per column brings every rollout to the first
rank of the data-parallel replica that trains it, which broadcasts it to the other ranks of the replica. Numbers per
loss token go back the same way, from the rank of the replica that has the log-probs. Every rank computes from table and
plan what it receives, so no sizes and no objects are sent.
Asserted by tests/parallel/test_rollout_transfer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_mega.data.rollout_table import RolloutTable
from grpo_mega.data.rollout_tokens import RolloutTokens, no_record, offsets_of
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.types import TokenValues

_Ints = NDArray[np.integer[Any]]
_RECORD_TYPES = (np.dtype(np.uint8), np.dtype(np.int16))


@dataclass(frozen=True)
class RolloutTransfer:
    """Transfers of this rank. All methods are collective."""

    collectives: ArrayCollectives

    @property
    def ranks(self) -> Ranks:
        """Coordinates of this rank."""
        return self.collectives.ranks

    def to_trainers(self, tokens: RolloutTokens, table: RolloutTable, trainer: _Ints) -> RolloutTokens:
        """Return the rollouts that this rank trains.

        Args:
            tokens: rollouts that this rank's prompt shard sampled, on its first rank; none on the others.
            table: all rollouts of the step.
            trainer: [R] data-parallel rank that trains the rollout.

        Raises:
            RuntimeError: the routing records of two ranks have different types.
        """
        tokens = self._with_record_shape(tokens, table)
        if self.collectives.world_size == 1:
            return tokens
        ids = np.flatnonzero(trainer == self.ranks.at.dp_rank)
        lengths, source = table.num_tokens, self._samplers(table)
        topology = self.ranks.topology
        target = np.array([topology.first_rank(dp_rank) for dp_rank in range(topology.dp)], dtype=np.int32)[trainer]
        size = int(lengths[ids].sum())

        def moved(column: NDArray[Any]) -> NDArray[Any]:
            found = self.collectives.move(column, lengths, source, target)
            return self.collectives.share_in_replica(found, size, from_loss_rank=False)

        experts = tokens.expert_choices
        return RolloutTokens(
            ids,
            offsets_of(lengths[ids]),
            table.prompt_tokens[ids].astype(np.int64),
            moved(tokens.token_ids),
            moved(tokens.sampler_log_probs),
            moved(tokens.loss_mask),
            moved(tokens.policy_versions),
            None if experts is None else moved(experts),
        )

    def to_samplers(self, values: TokenValues | None, table: RolloutTable, trainer: _Ints) -> TokenValues:
        """Return numbers of the rollouts that this rank's prompt shard sampled, on its first rank; else of none.

        Args:
            values: float32 numbers of all rollouts of this rank whose `trainer` is not -1; read on
                `Topology.loss_rank` of each data-parallel replica.
            table: all rollouts of the step.
            trainer: [R] data-parallel rank that has the numbers; -1: no rank has them.
        """
        topology, known = self.ranks.topology, trainer >= 0
        counts = np.where(known, table.loss_tokens, 0)
        loss_ranks = np.array([topology.loss_rank(dp_rank) for dp_rank in range(topology.dp)], dtype=np.int32)
        source = np.where(known, loss_ranks[trainer], -1)
        target = np.where(known, self._samplers(table), -1)
        is_source = self.ranks.rank == topology.loss_rank(self.ranks.at.dp_rank)
        sent = np.zeros(0, np.float32)
        if is_source:
            assert values is not None, "the last pipeline stage has the log-probs"
            sent = values.values.astype(np.float32, copy=False)
        received = self.collectives.move(sent, counts, source, target)
        ids = np.flatnonzero(target == self.ranks.rank)
        return TokenValues(ids, offsets_of(counts[ids]), received)

    def in_replica(self, values: TokenValues | None, positions: TokenValues) -> TokenValues:
        """Return the numbers of `Topology.loss_rank` on all ranks of the data-parallel replica, float32.

        Args:
            values: numbers of the rollouts of this rank; None on ranks without them.
            positions: names the rollouts and their loss tokens.
        """
        given = np.zeros(0, np.float32) if values is None else values.values.astype(np.float32, copy=False)
        found = self.collectives.share_in_replica(given, len(positions.values), from_loss_rank=True)
        return positions.with_values(found)

    def sum_per_rollout(self, values: NDArray[np.float64], ids: NDArray[np.int64], size: int) -> NDArray[np.float64]:
        """Return [size]: a number of every rollout of the step, from the numbers of each rank's own rollouts."""
        every = np.zeros(size)
        if self.ranks.rank == self.ranks.topology.loss_rank(self.ranks.at.dp_rank):
            every[ids] = values
        return self.collectives.sum(every)

    def _samplers(self, table: RolloutTable) -> NDArray[np.int32]:
        """Return the rank that has the tokens of each rollout, [R]."""
        return table.prompt_shard * self.ranks.topology.prompt_shard_size

    def _with_record_shape(self, tokens: RolloutTokens, table: RolloutTable) -> RolloutTokens:
        """Return the tokens with a column of routing records on all ranks, if any rollout of the step has a record."""
        if not table.has_experts.any():
            return tokens
        experts = tokens.expert_choices
        here = np.zeros(3)
        if experts is not None:
            here = np.array([_RECORD_TYPES.index(experts.dtype), *experts.shape[1:]], dtype=np.float64)
        kind, layers, chosen = self.collectives.gather(here).max(axis=0).astype(int).tolist()
        if experts is None:
            experts = no_record((len(tokens.token_ids), layers, chosen), _RECORD_TYPES[kind])
        elif experts.dtype != _RECORD_TYPES[kind]:
            raise RuntimeError(
                f"routing records of type {experts.dtype} here, and {_RECORD_TYPES[kind]} on other ranks"
            )
        return RolloutTokens(**{**vars(tokens), "expert_choices": experts})

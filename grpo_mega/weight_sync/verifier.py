"""Collective verification of a sync: every engine holds, and computes with, the policy's weights.

Asserted by tests/parallel/test_sync_ranks.py and tests/engine/test_weight_sync.py, with injected faults.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist

from grpo_mega.interfaces import HeldSlice, WeightSink
from grpo_mega.types import TensorSlice, WeightMismatchError
from grpo_mega.weight_sync.digest_comparison import (
    PieceDigests,
    differing_tensors,
    localize_mismatches,
    piece_digests,
    sink_digests,
)
from grpo_mega.weight_sync.plan import ReshardPlan
from grpo_mega.weight_sync.straggler_barrier import StragglerBarrier


class SyncVerifier:
    """Compares the digests of policy and engines on all ranks."""

    def __init__(
        self,
        sink: WeightSink,
        plan: ReshardPlan,
        dtypes: dict[str, torch.dtype],
        barrier: StragglerBarrier,
        replica_group: dist.ProcessGroup,
    ) -> None:
        """Create the verifier of this rank.

        Args:
            sink: the engine's end on this rank.
            plan: of the sync.
            dtypes: tensor -> dtype in which it is sent.
            barrier: over all ranks.
            replica_group: the ranks of this engine in this program.
        """
        self._sink, self._plan, self._dtypes = sink, plan, dtypes
        self._barrier, self._replica_group = barrier, replica_group

    def verify(self, shards: Sequence[HeldSlice], expected: dict[str, int]) -> None:
        """Collective: compare what every engine holds with the policy.

        Args:
            shards: the policy's slices on this rank.
            expected: tensor -> digest of the policy, on every rank.

        Raises:
            WeightMismatchError: on every rank; names the slices that differ, their ranks and senders.
        """
        suspects, faults = self._compare(expected, "comparing digests")
        if suspects:
            faults += self._localize(suspects, shards) or [
                f"{sorted(suspects)}: the policy's digest differs from the digests of the slices that were sent"
            ]
        raise_faults(faults)

    def verify_again(self, expected: dict[str, int], policy_version: int) -> None:
        """Collective: compare what every engine holds, some time after a push, with the digests of that push.

        The policy's weights are not read, so they may have changed or be elsewhere.

        Args:
            expected: tensor -> digest of the policy at the push, on every rank.
            policy_version: of the push, for the message.

        Raises:
            WeightMismatchError: on every rank; names the tensors that differ and the first rank that found each.
        """
        suspects, faults = self._compare(expected, "comparing digests again")
        faults += [
            f"{name}: the weights of version {policy_version} were equal to the policy's after the sync, and the "
            f"engine's have changed since (found by rank {rank})"
            for name, rank in sorted(suspects.items())
        ]
        raise_faults(faults)

    def _compare(self, expected: dict[str, int], doing: str) -> tuple[dict[str, int], list[str]]:
        """Return the tensors that differ, each with the first rank that found it, and other faults. Collective.

        Raises:
            WeightMismatchError: an engine failed.
        """
        held, stale, failed = self._digests_of_sink()
        replica: list[dict[TensorSlice, int]] = [{} for _ in range(self._replica_group.size())]
        dist.all_gather_object(replica, held, group=self._replica_group)
        findings = self._barrier.gather((differing_tensors(expected, replica), stale, failed), doing)
        raise_faults([fault for _, _, faults in findings for fault in faults])
        suspects: dict[str, int] = {}
        for rank, (names, _, _) in enumerate(findings):
            for name in names:
                suspects.setdefault(name, rank)
        return suspects, [fault for _, stale_slices, _ in findings for fault in stale_slices]

    def _digests_of_sink(self) -> tuple[dict[TensorSlice, int], list[str], list[str]]:
        """Return digests of the engine's weights, messages about stale derived values, and failures of the engine."""
        try:
            held = sink_digests(self._sink, self._sink.layout())
            stale = [f"{self._derived_slices(name)}: {what}" for name, what in self._sink.probe().items()]
        except RuntimeError as error:  # reported to all ranks, which would otherwise wait for this one
            return {}, [], [f"the engine of rank {self._barrier.rank} failed in the verification: {error}"]
        return held, stale, []

    def _localize(self, suspects: Collection[str], shards: Sequence[HeldSlice]) -> list[str]:
        mine = piece_digests(self._plan, self._barrier.rank, suspects, shards, self._sink, self._dtypes)
        everywhere: list[PieceDigests] = self._barrier.gather(mine, "locating the slices that differ")
        return localize_mismatches(self._plan, suspects, everywhere)

    def _derived_slices(self, parameter: str) -> str:
        """Return a message that names the slices whose derived values `probe` checked under this parameter name."""
        regions = (r for r in self._sink.layout() if r.kind == "derived" and r.placement.local.name == parameter)
        slices = ", ".join(str(r.placement.hf) for r in regions) or parameter
        return f"{slices} on rank {self._barrier.rank}: the kernel computes with other weights than the engine stores"


def raise_faults(faults: Sequence[str]) -> None:
    """Do nothing without faults.

    Raises:
        WeightMismatchError: there are faults; the text holds the first five and the number of all.
    """
    if faults:
        raise WeightMismatchError("weight sync: " + "; ".join(faults[:5]) + f" ({len(faults)} in all)")

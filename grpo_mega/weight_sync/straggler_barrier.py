"""Barrier over the ranks' shared store; on timeout it names the missing ranks.

Asserted by tests/parallel/test_sync_ranks.py.
"""

from __future__ import annotations

from typing import TypeVar

from grpo_mega.parallel.peer_group import PeerFailedError, PeerGroup

T = TypeVar("T")


class StragglerBarrier:
    """Barriers in a sequence of phases, each of which gathers one object from every rank."""

    def __init__(self, name: str, where: list[str], timeout_seconds: float, world: PeerGroup) -> None:
        """Create the barriers of this rank. All ranks use the same name, and create the same number of such objects.

        Args:
            name: prefix of the keys in the store.
            where: `where[r]` is the coordinates of rank r, for messages.
            timeout_seconds: limit of the wait in each phase.
            world: all ranks.
        """
        created = world.store.add(f"{name}/created_by/{world.rank}", 1)  # the keys of earlier ones stay in the store
        self._name, self._where, self._phase = f"{name}/{created}", where, 0
        self._timeout, self._world = timeout_seconds, world

    @property
    def rank(self) -> int:
        """This rank."""
        return self._world.rank

    def gather(self, value: T, phase: str) -> list[T]:
        """Collective: return the values of all ranks, in their order.

        Args:
            value: plain values, as `PeerGroup.gather` takes them.
            phase: what the ranks are doing, for messages.

        Raises:
            PeerFailedError: another rank has reported a failure.
            RuntimeError: a rank did not arrive in time; names all missing ranks.
        """
        self._phase += 1
        rank = self._world.rank
        try:
            self._world.store.set(self._key(rank), phase)
            # Wait here first: the collective has the timeout of the process group, and does not name missing ranks.
            self._world.await_keys([self._key(each) for each in range(len(self._where))], self._timeout)
            return self._world.gather(value)
        except PeerFailedError:
            raise
        except RuntimeError as error:
            self._world.check_others()
            missing = ", ".join(f"rank {each} ({self._where[each]})" for each in self.missing_ranks())
            timed_out = f"rank {rank} ({self._where[rank]}) timed out after {self._timeout:g} s"
            reason = f"waiting for {missing}" if missing else "although all ranks had arrived when checked again"
            raise RuntimeError(f"weight sync, {phase}: {timed_out} {reason} ({error})") from error

    def missing_ranks(self) -> list[int]:
        """Return the ranks that have not reached the present phase."""
        try:
            return [r for r in range(len(self._where)) if not self._world.store.check([self._key(r)])]
        except RuntimeError:  # rank 0 holds the store
            return [0]

    def _key(self, rank: int) -> str:
        return f"{self._name}/{self._phase}/{rank}"

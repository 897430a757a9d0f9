"""Rewards that score many completions at once: the contract, and threads that score while the engine samples.

A batched reward is a factory, `factory(**args) -> BatchScorer`, that declares its range with `@batched_reward`. It is
named in the config like any other and lives in the process of the rank: it may use its device (`reward_model`) or wait
for a server (`judge`, `remote`). `reward.timeout_seconds` does not count there; each keeps a limit of its own.

Invariants (tests/unit/rewards/test_batched.py): every submitted key comes back, as a number or as the reason why there
is none; `submit` never waits; at most `concurrency` batches are under way; `close` does not wait for any of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ScoringRow:
    """What a reward sees of one completion."""

    prompt: str
    completion: str
    reference: str


class BatchScorer(Protocol):
    """What a factory of a batched reward returns."""

    def submit(self, key: int, row: ScoringRow) -> None:
        """Take a completion; returns at once."""
        ...

    def collect(self) -> dict[int, float | Exception]:
        """A value, or why there is none, for everything submitted since the last call."""
        ...

    def close(self) -> None:
        """Give everything back. A second call does nothing."""
        ...


class ThreadedScorer:
    """Calls `score` with batches of rows from a few threads, as soon as there are rows.

    Args:
        score: rows -> one value, or reason, each; may wait, must end. What it raises is the reason for all of them.
        batch_size: rows of one call, at most.
        concurrency: threads.
        wait_seconds: how long `collect` waits; rows without a value then have failed.
    """

    def __init__(
        self,
        score: Callable[[Sequence[ScoringRow]], Sequence[float | Exception]],
        *,
        batch_size: int,
        concurrency: int,
        wait_seconds: float = 300.0,
    ) -> None:
        self._score, self._batch_size, self._wait_seconds = score, batch_size, wait_seconds
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[tuple[int, ScoringRow]] = deque()
        self._pending: set[int] = set()
        self._round = 0  # a value that comes after its collect belongs to nobody
        self._done: dict[int, float | Exception] = {}
        self._closed = False
        for number in range(concurrency):
            # daemons: a server that does not answer must not keep the program from ending
            threading.Thread(target=self._serve, name=f"reward-{number}", daemon=True).start()

    def submit(self, key: int, row: ScoringRow) -> None:
        """Queue a row."""
        with self._changed:
            self._waiting.append((key, row))
            self._pending.add(key)
            self._changed.notify()

    def collect(self) -> dict[int, float | Exception]:
        """Wait for all rows since the last call, at most `wait_seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self._closed, self._wait_seconds)
            late = TimeoutError(f"no value within {self._wait_seconds:g} s of the end of sampling")
            done = self._done | dict.fromkeys(self._pending, late)
            self._round += 1
            self._waiting.clear()
            self._pending, self._done = set(), {}
            return done

    def close(self) -> None:
        """Let the threads end; those that wait for a server end when it answers."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
                if self._closed:
                    return
                round_number = self._round
                batch = [self._waiting.popleft() for _ in range(min(self._batch_size, len(self._waiting)))]
            values: Sequence[float | Exception]
            try:
                values = self._score([row for _, row in batch])
                if len(values) != len(batch):
                    raise ValueError(f"{len(values)} values for {len(batch)} completions")
            except Exception as error:  # whatever it is, the rows must come back
                values = [error] * len(batch)
            with self._changed:
                if round_number == self._round:
                    self._done.update((key, value) for (key, _), value in zip(batch, values, strict=True))
                    self._pending.difference_update(key for key, _ in batch)
                    self._changed.notify_all()

"""Rewards that score many completions at once: the contract, and threads that score while the engine samples.

A batched reward is a factory, `factory(**args) -> BatchScorer`, that declares its range with `@batched_reward`. The
config names it like any other reward. It runs in the process of the rank: it may use the rank's device (`reward_model`)
or wait for a server (`judge`, `remote`). `reward.timeout_seconds` does not apply to it; each one has its own limit.

Invariants (tests/unit/rewards/test_batched.py): `collect` returns every submitted key, with a number or the reason why
there is none; `submit` never waits; at most `concurrency` batches are scored at once; `close` waits for none of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from grpo_mega.rewards.inputs import ScoringRow

__all__ = ["BatchScorer", "ScoringRow", "ThreadedScorer"]


class BatchScorer(Protocol):
    """The object that a factory of a batched reward returns."""

    def submit(self, key: int, row: ScoringRow) -> None:
        """Queue a completion for scoring; return at once."""
        ...

    def collect(self) -> dict[int, float | Exception]:
        """Return a value, or the reason why there is none, for every key that was submitted since the last call."""
        ...

    def close(self) -> None:
        """Release all resources. A second call does nothing."""
        ...


class ThreadedScorer:
    """Threads that call `score` with batches of rows as soon as rows are submitted.

    Args:
        score: takes rows and returns one value, or one exception as the reason, per row. It may wait, but must return.
            An exception that it raises is the reason for all its rows.
        batch_size: maximum number of rows of one call.
        concurrency: number of threads.
        wait_seconds: limit of `collect`; rows without a value have failed then.
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
        self._round = 0  # values of an earlier round, which arrive after its `collect`, are dropped
        self._done: dict[int, float | Exception] = {}
        self._closed = False
        for number in range(concurrency):
            # daemon threads: a server that does not answer must not keep the program from exiting
            threading.Thread(target=self._serve, name=f"reward-{number}", daemon=True).start()

    def submit(self, key: int, row: ScoringRow) -> None:
        """Queue a row."""
        with self._changed:
            self._waiting.append((key, row))
            self._pending.add(key)
            self._changed.notify()

    def collect(self) -> dict[int, float | Exception]:
        """Wait for the values of all rows since the last call, at most `wait_seconds`, and return them by key."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self._closed, self._wait_seconds)
            late = TimeoutError(f"no value within {self._wait_seconds:g} s of the end of sampling")
            done = self._done | dict.fromkeys(self._pending, late)
            self._round += 1
            self._waiting.clear()
            self._pending, self._done = set(), {}
            return done

    def close(self) -> None:
        """Stop the threads. A thread that waits for a server stops when the server answers."""
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
            except Exception as error:  # every row must get a value or a reason
                values = [error] * len(batch)
            with self._changed:
                if round_number == self._round:
                    self._done.update((key, value) for (key, _), value in zip(batch, values, strict=True))
                    self._pending.difference_update(key for key, _ in batch)
                    self._changed.notify_all()

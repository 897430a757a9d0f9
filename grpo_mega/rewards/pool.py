"""Scores completions in worker processes while the caller continues to sample.

A thread of the caller's process owns the workers (scoring_thread.py); the caller shares a queue with it
(scoring_queue.py). Batched rewards (batched.py) are scored in the caller's process at the same time. Without any other
reward there are no workers. `reward.timeout_seconds` is enforced by workers/time_limit.py in the worker, and by
scoring_thread.py.

Invariants (tests/unit/rewards/test_pool.py): every submitted key is returned by `collect`, whatever its reward did;
`submit` does not wait; no worker outlives its parent; the values do not depend on the number of workers. A scoring that
times out, crashes, raises or returns no number is named in `Reward.failures`, counted in `failure_counts` and logged
(failures.py). It scores its declared floor, or the reward has no value (`OnFailure`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Unpack

from grpo_mega.rewards.base import OnFailure, Term, build_rewards
from grpo_mega.rewards.batched import BatchScorer
from grpo_mega.rewards.combine import combine
from grpo_mega.rewards.failures import FailureLog, failure_of
from grpo_mega.rewards.inputs import INPUTS, TEXTS, RowContext, ScoringRow
from grpo_mega.rewards.scoring_errors import BadValueError
from grpo_mega.rewards.scoring_queue import ScoringQueue
from grpo_mega.rewards.scoring_thread import ScoringThread
from grpo_mega.rewards.worker_jobs import ScoringJob
from grpo_mega.types import Reward


class RewardPool:
    """Worker processes that score completions; use as a context manager, or `close()` it.

    Args:
        terms: the reward terms, checked here, before a worker starts.
        workers: number of processes; each uses one core.
        timeout_seconds: wall-clock limit of one component of one completion; the process that passes it is killed and
            replaced.
        on_failure: effect of a failed scoring for all terms; None: what each reward declares.

    Raises:
        UserError: a term is wrong (see `build_rewards`).
        RuntimeError: the workers do not start on this machine.
    """

    def __init__(
        self, terms: Sequence[Term], *, workers: int, timeout_seconds: float, on_failure: OnFailure | None = None
    ) -> None:
        self._components = build_rewards(terms, timeout_seconds, on_failure)
        self._positions = [i for i, component in enumerate(self._components) if not component.is_batched]
        self._scorers = {i: component.open() for i, component in enumerate(self._components) if component.is_batched}
        self._failures = FailureLog(self._components)
        self._queue = ScoringQueue()
        setup: dict[str, object] = {
            "terms": [
                None if component.is_batched else [term.name, term.weight, dict(term.args)]
                for term, component in zip(terms, self._components, strict=True)
            ],
            "timeout_seconds": timeout_seconds,
        }
        num_workers = workers if self._positions else 0
        read = {name for i in self._positions for name in self._components[i].inputs}
        self._thread = ScoringThread(
            self._queue,
            self._failures,
            setup,
            inputs=[*TEXTS, *(name for name in INPUTS if name in read - set(TEXTS))],
            num_workers=num_workers,
            timeout_seconds=timeout_seconds,
        )
        error = self._queue.wait_for_workers(num_workers)
        if error is not None:
            self.close()
            raise RuntimeError(f"reward workers do not start: {error}") from error

    @property
    def failure_counts(self) -> Counter[str]:
        """Number of failed scorings per component since the start."""
        return self._failures.counts

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the current workers."""
        return self._thread.worker_pids

    def submit(self, key: int, prompt: str, completion: str, reference: str, **context: Unpack[RowContext]) -> None:
        """Queue one completion for scoring, as `submit_row`. The other arguments are those of `ScoringRow`."""
        self.submit_row(key, ScoringRow(prompt, completion, reference, **context))

    def submit_row(self, key: int, row: ScoringRow) -> None:
        """Queue one completion for scoring; return at once.

        Raises:
            ValueError: `key` was submitted before and is not collected yet.
            RuntimeError: the pool is closed or its workers cannot be restarted.
        """
        applying = [i for i in self._positions if self._components[i].applies_to(row.dataset)]
        was_empty = self._queue.add(ScoringJob(key, row, applying))
        for position, scorer in self._scorers.items():
            if self._components[position].applies_to(row.dataset):
                scorer.submit(key, row)
        if was_empty:
            self._thread.wake()

    def collect(self) -> dict[int, Reward]:
        """Wait for all completions that were submitted since the last call, and return their rewards by key.

        The wait is at most `timeout_seconds` per component and completion in the workers, and as long as the batched
        rewards take.

        Raises:
            RuntimeError: the pool is closed or its workers cannot be restarted.
        """
        jobs = self._queue.take_done()
        for position, scorer in self._scorers.items():
            self._add_batched_values(position, scorer, jobs)
        rewards = {key: combine(self._components, job) for key, job in jobs.items()}
        self._failures.log(len(rewards))
        return rewards

    def close(self) -> None:
        """Kill the workers, also in the middle of a scoring. A second call does nothing."""
        self._queue.close()
        self._thread.join()
        for scorer in self._scorers.values():
            scorer.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _add_batched_values(self, position: int, scorer: BatchScorer, jobs: dict[int, ScoringJob]) -> None:
        """Add the values of one batched reward to the jobs."""
        component = self._components[position]
        values: dict[int, float | Exception]
        try:
            values = scorer.collect()
        except Exception as error:  # an error of a scorer must not end the run
            values = dict.fromkeys(jobs, error)
        for key, job in jobs.items():
            if not component.applies_to(job.row.dataset):
                continue
            try:
                job.components[position] = component.checked(
                    values.get(key, BadValueError("the scorer returned no value"))
                )
            except Exception as error:  # raised by the scorer, or by the check of its value
                self._failures.fail(job, position, *failure_of(error))

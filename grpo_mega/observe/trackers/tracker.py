"""The interface of a tracker, its choice by the config, and a queue that keeps its faults away from the run.

Asserted by tests/unit/observe/test_trackers.py and, with the real libraries, tests/e2e/test_trackers_long.py.
"""

from __future__ import annotations

import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from grpo_mega.observe.trackers.tracked_run import TrackedRun
from grpo_mega.types import UserError

log = logging.getLogger(__name__)

TrackerName = Literal["wandb", "mlflow"]
_PACKAGES: Mapping[TrackerName, str] = {"wandb": "wandb", "mlflow": "mlflow"}
_MAX_PENDING = 1000  # calls that wait for a slow tracker
_CLOSE_SECONDS = 120.0  # allowed to a tracker for what is still queued


class Tracker(Protocol):
    """A tracker of one run. Any method may raise any exception of its library."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each curve; the names are those of observe/metric_table.py, the values finite."""
        ...

    def finish(self, *, is_complete: bool) -> None:
        """Mark the run as complete or interrupted, and write what the library still holds."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """Check that each tracker is named once, and its library is installed.

    Raises:
        UserError: a library is missing, or a tracker is named twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"observe.trackers names {name} twice", remedy="name each system once")
        if name in _PACKAGES and importlib.util.find_spec(name) is None:
            raise UserError(
                f"observe.trackers names {name}, which is not installed",
                remedy=f"pip install 'grpo_mega[{name}]', or remove it from observe.trackers",
            )


def open_tracker(name: TrackerName, folder: Path, config: Mapping[str, Any]) -> QueuedTracker:
    """Open the tracker of a run.

    Args:
        name: of the tracker.
        folder: the run folder, into which the library writes unless its own environment variables name a server.
        config: the resolved config, which the tracker shows.
    """
    run = TrackedRun.of(folder, config)

    def make() -> Tracker:
        if name == "wandb":
            from grpo_mega.observe.trackers.wandb_tracker import WandbTracker

            return WandbTracker(run)
        from grpo_mega.observe.trackers.mlflow_tracker import MlflowTracker

        return MlflowTracker(run)

    return QueuedTracker(name, make)


class QueuedTracker:
    """A tracker on a thread of its own. Its exceptions and waits affect neither the run nor the other trackers.

    After an exception the tracker is not called again, and the log says so once. Calls that a slow tracker could not
    take are dropped, with their number in the log.

    Args:
        name: of the tracker, for the log.
        make: opens the tracker; called in the thread.
        close_seconds: limit of the wait in `close`.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], close_seconds: float = _CLOSE_SECONDS) -> None:
        self._name, self._make, self._close_seconds = name, make, close_seconds
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MAX_PENDING)
        self._num_dropped = 0
        self._is_complete = self._has_failed = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the points of a step; return at once."""
        self._put(lambda tracker: tracker.write(step, metrics))

    def finish(self) -> None:
        """Note that the run is complete."""
        self._is_complete = True

    def close(self) -> None:
        """Wait until what is queued is written, at most `close_seconds`."""
        end = time.monotonic() + self._close_seconds
        with suppress(queue.Full):  # the thread takes nothing any more
            self._calls.put(None, timeout=self._close_seconds)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._num_dropped:
            log.warning("the tracker %s was too slow for %d calls, which are lost", self._name, self._num_dropped)
        if self._thread.is_alive():
            limit = self._close_seconds
            log.warning("the tracker %s did not end within %g s; its last points may be lost", self._name, limit)

    def _put(self, call: Callable[[Tracker], None]) -> None:
        if self._has_failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._num_dropped += 1

    def _run(self) -> None:
        try:
            tracker = self._make()
            while (call := self._calls.get()) is not None:
                call(tracker)
            tracker.finish(is_complete=self._is_complete)
        except BaseException as error:  # whatever the library raises, the run continues
            self._has_failed = True
            reason = f"{type(error).__name__}: {error}"
            log.warning("the tracker %s failed and is not used any more (%s)", self._name, reason)

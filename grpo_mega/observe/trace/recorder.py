"""Records what a rank does and when, in a file of its own.

A line is one JSON array: `["clock", ...]` begins a part with the offset of the rank's clock, `["thread", id, name]`
names a thread, `["span", thread, name, category, start, nanoseconds, args]` and `["counter", name, at, value]` are
events, in nanoseconds of the rank's monotonic clock. A killed run leaves at most an incomplete last line.
Asserted by tests/unit/observe/test_trace.py and tests/e2e/test_trace.py.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MAX_BYTES = 64 * 1024 * 1024
"""Size of a rank's file at which the rank stops to record."""
_MAX_PENDING = 20_000  # events in memory


class TraceRecorder:
    """Recorder of one rank. `span`, `counter` and `record` may be called in any thread.

    Args:
        path: file of the rank; events are appended.
        name: name of the rank in the trace.
        max_bytes: size of the file at which recording ends.
    """

    def __init__(self, path: Path, name: str, *, max_bytes: int = MAX_BYTES) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        if self._file.tell():
            self._file.write(b"\n")  # a killed run may have left an incomplete line
        self._name, self._left = name, max_bytes - self._file.tell()
        self._pending: list[tuple[Any, ...]] = []
        self._threads: set[int] = set()
        self._flushing = threading.Lock()

    @property
    def is_full(self) -> bool:
        """True if the file has reached its largest size; nothing more is recorded."""
        return self._left <= 0

    def set_clock(self, offset_ns: int, uncertainty_ns: int) -> None:
        """Begin a part of the file: `offset_ns` leads from this rank's clock to nanoseconds since 1970."""
        self.flush()
        self._pending.append(("clock", self._name, offset_ns, uncertainty_ns))
        self.flush()

    def record(self, name: str, category: str, start_ns: int, end_ns: int, args: dict[str, Any]) -> None:
        """Add a span of this thread, in nanoseconds of `time.monotonic_ns`."""
        self._add(("span", self._thread(), name, category, start_ns, end_ns - start_ns, args))

    @contextmanager
    def span(self, name: str, category: str, **args: Any) -> Iterator[dict[str, Any]]:
        """Record the `with` block, also after an exception. The block may add values to the yielded dictionary."""
        start = time.monotonic_ns()
        try:
            yield args
        finally:
            self.record(name, category, start, time.monotonic_ns(), args)

    def counter(self, name: str, at_ns: int, value: float) -> None:
        """Add a point of a curve."""
        self._add(("counter", name, at_ns, value))

    def flush(self) -> None:
        """Append what was recorded to the file."""
        with self._flushing:
            pending, self._pending = self._pending, []
            if self._left <= 0 or not pending:
                return
            content = "".join(f"{json.dumps(event, default=str)}\n" for event in pending).encode()
            try:
                self._file.write(content)
            except OSError as error:
                self._left = 0
                log.warning("the trace of this rank ends here: it cannot be written (%s)", error)
                return
            self._left -= len(content)
            if self._left <= 0:
                log.warning("the trace of this rank ends here: it has %d MB", self._file.tell() // 2**20)

    def close(self) -> None:
        """Append what was recorded, and close the file. A second call does nothing."""
        if not self._file.closed:
            self.flush()
            self._file.close()

    def _thread(self) -> int:
        thread = threading.get_native_id()
        if thread not in self._threads:
            self._threads.add(thread)
            self._add(("thread", thread, threading.current_thread().name))
        return thread

    def _add(self, event: tuple[Any, ...]) -> None:
        if self.is_full or self._file.closed:
            return
        self._pending.append(event)
        if len(self._pending) >= _MAX_PENDING:
            self.flush()

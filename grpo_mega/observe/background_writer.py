"""A thread that writes files in the order in which they were submitted, while training continues.

An error of the thread is raised by the next call of the thread that submits, as the exception that it is; everything
submitted after it is dropped, so that no later file exists without the earlier one.
Asserted by tests/unit/observe/test_background_writer.py.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

MAX_PENDING = 64
"""Writes that wait at the same time; one more makes `submit` wait, so memory stays bounded on a slow disk."""


class BackgroundWriter:
    """Executes writes on one thread, in order. The thread starts with the first write.

    Args:
        max_pending: number of writes that may wait or be in progress.
    """

    def __init__(self, max_pending: int = MAX_PENDING) -> None:
        self._max_pending = max_pending
        self._pending: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._error_was_raised = self._is_closing = False
        self._thread: threading.Thread | None = None

    def submit(self, write: Callable[[], object]) -> None:
        """Queue a write. What it refers to must not change any more.

        Raises:
            Exception: an earlier write failed, with its exception.
            ValueError: the writer is closed.
        """
        with self._changed:
            if self._is_closing:
                raise ValueError("the background writer is closed")
            self._changed.wait_for(lambda: len(self._pending) < self._max_pending or self._error is not None)
            self._raise_error()
            self._pending.append(write)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="background writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything submitted is written.

        Raises:
            Exception: a write failed, with its exception.
        """
        self.wait()
        with self._changed:
            self._raise_error()

    def wait(self) -> None:
        """Wait until everything submitted is written or has failed; raise nothing."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)

    def close(self) -> None:
        """Write what is submitted, and end the thread.

        Raises:
            Exception: a write failed, and no call has raised its exception yet.
        """
        self.wait()
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if not self._error_was_raised:
            self._raise_error()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _raise_error(self) -> None:
        if self._error is not None:
            self._error_was_raised = True
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_closing)
                if not self._pending:
                    return
                write = self._pending[0]
            try:
                write()
            except BaseException as error:  # raised in the thread that submits
                with self._changed:
                    self._error = error
                    self._pending.clear()
                    self._changed.notify_all()
                continue
            with self._changed:
                self._pending.popleft()
                self._changed.notify_all()

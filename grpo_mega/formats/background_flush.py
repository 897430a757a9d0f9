"""Flushes a file to disk while it is written, and after that while it is read back.

A flush at the end would leave the disk idle during the write, and its duration would grow with the file. Here the disk
works from the first part on, and at most 1 GiB of a file waits for it.
Asserted by tests/unit/formats/test_background_flush.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

_FLUSH_BYTES, _MAX_WAITING_BYTES = 1 << 26, 1 << 30


class BackgroundFlush:
    """The thread that flushes one file. It starts with the first 64 MiB, so a small file needs none."""

    def __init__(self, path: Path) -> None:
        """Open the file `path` for writing, empty. `finish` or `abandon` closes it.

        Raises:
            OSError: it cannot be opened.
        """
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._path, self._waiting_bytes = path, 0
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def add(self, num_bytes: int) -> None:
        """Note that bytes were written. Waits while more than 1 GiB is not flushed.

        Raises:
            OSError: the file cannot be flushed.
        """
        with self._changed:
            self._waiting_bytes += num_bytes
            if self._waiting_bytes < _FLUSH_BYTES:
                return
            if self._thread is None:
                # a daemon: a thread that waits for a file system must not keep a failed rank alive
                thread = threading.Thread(target=self._run, name="checkpoint-flush", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting_bytes <= _MAX_WAITING_BYTES or self._error is not None)
            self._raise_error()

    def finish(self) -> None:
        """Flush the rest of the file, and close it.

        Raises:
            OSError: the file could not be flushed.
        """
        try:
            self._stop_thread()
            self._raise_error()
            self._flush(os.fsync)
            self._raise_error()
        finally:
            os.close(self.descriptor)

    def abandon(self) -> None:
        """Close a file that is not needed; the flush that is running ends first."""
        self._stop_thread()
        os.close(self.descriptor)

    def _stop_thread(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _flush(self, flush: Callable[[int], None]) -> None:
        try:
            flush(self.descriptor)
        except OSError as error:
            self._error = OSError(error.errno, error.strerror, str(self._path))

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting_bytes >= _FLUSH_BYTES or self._is_closing)
                if self._is_closing:
                    return
                taken = self._waiting_bytes
            self._flush(os.fdatasync)
            with self._changed:
                self._waiting_bytes -= taken
                self._changed.notify_all()
                if self._error is not None:
                    return

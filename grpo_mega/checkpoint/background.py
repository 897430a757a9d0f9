"""Saves that are written while training continues.

A save copies its tensors to host memory; a thread of each rank then writes them, flushes them to disk, reads them back
and computes their digests. It uses no collective and no device. The copies stay allocated for the next save, and at
most one save is in flight. A thread cannot die without its rank, so a killed writer is a killed rank.
Asserted by tests/parallel/test_background_saves.py.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from grpo_mega.checkpoint.written_state import WrittenFiles, read_back
from grpo_mega.formats.file_parts import CopiedFiles, CopyMemory
from grpo_mega.parallel.ranks import first_error
from grpo_mega.types import StateRecords

_POLL_SECONDS = 0.05
_STOP_SECONDS = 10.0


class WriterStoppedError(Exception):
    """The thread was asked to stop."""


class BackgroundSaves:
    """The saves of this rank, of which at most one is in flight."""

    def __init__(self, timeout_seconds: float) -> None:
        """Create the saves. A writer that makes no progress for `timeout_seconds` has failed."""
        self._timeout_seconds = timeout_seconds
        self._memory = CopyMemory()
        self._writer: Writer | None = None

    @property
    def is_writing(self) -> bool:
        """True while the thread of this rank writes or reads back."""
        return self._writer is not None and not self._writer.ended

    def new_files(self) -> CopiedFiles:
        """Return the sink for the files of the next save."""
        assert self._writer is None, "a save is in flight"
        return CopiedFiles(self._memory)

    def start(self, files: CopiedFiles, folder: Path, live: StateRecords) -> None:
        """Write the copied files of this rank into `folder`, and read them back, in a thread."""
        assert self._writer is None, "a save is in flight"
        self._writer = Writer(files, folder, live)

    def result(self, *, wait: bool) -> WrittenFiles | None:
        """Return what this rank has read back, once all ranks have written; None if one is still writing. Collective.

        Ranks that wait exchange messages all the time, so none waits in a collective for longer than this takes.

        Raises:
            RuntimeError: on all ranks, if the writer of one failed, or made no progress (names the rank).
        """
        writer = self._writer
        assert writer is not None, "no save is in flight"
        while True:
            error = writer.error or writer.stall(self._timeout_seconds)
            running, failed = any_rank(not writer.ended, bool(error))
            if failed:
                self.stop()
                raise RuntimeError(first_error(error))
            if not running:
                self._writer = None
                assert writer.written is not None, "the writer ended without a result"
                return writer.written
            if not wait:
                return None
            writer.wait(_POLL_SECONDS)

    def stop(self) -> None:
        """Stop a save in flight; its files stay incomplete."""
        if self._writer is not None:
            self._writer.stop()
            self._writer = None


class Writer:
    """The thread that writes the files of one save on this rank."""

    def __init__(self, files: CopiedFiles, folder: Path, live: StateRecords) -> None:
        """Start to write and to read back."""
        self.written: WrittenFiles | None = None
        self.error = ""
        self._files, self._folder, self._live = files, folder, live
        self._stopping, self._moved = threading.Event(), time.monotonic()
        # a daemon: a thread that waits for a file system must not keep a failed rank alive
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """True if the thread is not running any more."""
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for the end of the thread, at most `seconds`."""
        self._thread.join(seconds)

    def stall(self, timeout_seconds: float) -> str:
        """Return what is wrong if the thread has made no progress for this time, or an empty string."""
        idle = time.monotonic() - self._moved
        if self.ended or idle < timeout_seconds:
            return ""
        return f"the file system has taken nothing for {idle:.0f} s (guard.timeout_seconds={timeout_seconds:g})"

    def stop(self) -> None:
        """Ask the thread to stop, and wait a short time for it: it may hang in a system call."""
        self._stopping.set()
        self.wait(_STOP_SECONDS)

    def _run(self) -> None:
        try:
            self._files.write(self._progress)
            self.written = read_back(self._folder, self._live, self._files, each=self._progress)
        except Exception as error:  # raised on all ranks at the next step
            self.error = f"{type(error).__name__}: {error}"

    def _progress(self, _: int = 0) -> None:
        self._moved = time.monotonic()
        if self._stopping.is_set():
            raise WriterStoppedError("the save was stopped")


def any_rank(*flags: bool) -> list[bool]:
    """Return for each flag if it is set on any rank. Collective."""
    found = torch.tensor([int(flag) for flag in flags])
    if dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]

"""A file is flushed while it is written; a slow disk slows the writer, and a failing one ends it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from grpo_mega.formats import background_flush
from grpo_mega.formats.background_flush import BackgroundFlush


@contextmanager
def flushing(
    path: Path, monkeypatch: pytest.MonkeyPatch, fdatasync: Callable[[int], None]
) -> Iterator[BackgroundFlush]:
    """Flush after 10 bytes; 20 may wait."""
    monkeypatch.setattr(background_flush, "_FLUSH_BYTES", 10)
    monkeypatch.setattr(background_flush, "_MAX_WAITING_BYTES", 20)
    monkeypatch.setattr(background_flush.os, "fdatasync", fdatasync)
    flush = BackgroundFlush(path)
    try:
        yield flush
    except BaseException:
        flush.abandon()
        raise
    flush.finish()


def test_a_small_file_needs_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flushing(tmp_path / "file", monkeypatch, lambda _: None) as flush:
        flush.add(9)
        assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint-flush"]


def test_the_writer_waits_only_while_too_much_is_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, returned = threading.Event(), threading.Event(), threading.Event()

    def flush_slowly(_: int) -> None:
        begun.set()
        assert go_on.wait(30)

    with flushing(tmp_path / "file", monkeypatch, flush_slowly) as flush:
        flush.add(20)  # returns while the flush is running
        assert begun.wait(30)

        def add() -> None:
            flush.add(1)
            returned.set()

        writer = threading.Thread(target=add)
        writer.start()
        assert not returned.wait(0.2)
        go_on.set()
        assert returned.wait(30)
        writer.join()


def test_a_flush_that_fails_ends_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    def write() -> None:
        with flushing(tmp_path / "file", monkeypatch, fail) as flush:
            flush.add(15)
            flush.add(15)  # must not wait for ever

    with pytest.raises(OSError, match="input/output error"):
        write()


def test_an_error_of_the_flush_is_raised_at_the_end_at_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def fail_late(_: int) -> None:
        begun.set()
        go_on.wait(30)
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(background_flush, "_FLUSH_BYTES", 10)
    monkeypatch.setattr(background_flush.os, "fdatasync", fail_late)
    flush = BackgroundFlush(tmp_path / "file")
    flush.add(10)
    assert begun.wait(30)
    go_on.set()
    with pytest.raises(OSError, match=r"input/output error: '.*file'"):
        flush.finish()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(flush.descriptor)


def test_closing_waits_for_the_flush_that_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()

    def flush_slowly(_: int) -> None:
        begun.set()
        threading.Event().wait(0.2)
        ended.set()

    with flushing(tmp_path / "file", monkeypatch, flush_slowly) as flush:
        flush.add(10)
        assert begun.wait(30)
    assert ended.is_set(), "the descriptor was closed during a flush"

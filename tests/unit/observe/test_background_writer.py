"""Order, errors and the end of the background writer."""

from __future__ import annotations

import threading

import pytest

from grpo_mega.observe.background_writer import BackgroundWriter


class DiskError(OSError):
    pass


def fail() -> None:
    raise DiskError("no space")


def test_writes_are_made_in_order_on_one_other_thread() -> None:
    found: list[int] = []
    threads: set[int] = set()
    with BackgroundWriter() as writer:
        for i in range(100):
            writer.submit(lambda i=i: (found.append(i), threads.add(threading.get_ident())))
        writer.flush()
        assert found == list(range(100))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_submit_returns_before_the_write_is_made() -> None:
    go = threading.Event()
    found: list[int] = []
    with BackgroundWriter() as writer:
        writer.submit(lambda: (go.wait(60), found.append(1)))
        assert found == []
        go.set()
    assert found == [1], "close writes what is submitted"


def test_more_writes_than_may_wait_make_submit_wait() -> None:
    go, submitted = threading.Event(), threading.Event()
    with BackgroundWriter(max_pending=2) as writer:
        for _ in range(2):
            writer.submit(lambda: go.wait(60))
        other = threading.Thread(target=lambda: (writer.submit(lambda: None), submitted.set()))
        other.start()
        assert not submitted.wait(0.2)
        go.set()
        assert submitted.wait(60)
        other.join()


@pytest.mark.parametrize("call", ["submit", "flush"])
def test_an_error_is_raised_by_the_next_call_as_it_is_and_later_writes_are_dropped(call: str) -> None:
    found: list[int] = []
    writer = BackgroundWriter()
    writer.submit(fail)
    writer.wait()
    calls = {"submit": lambda: writer.submit(lambda: found.append(1)), "flush": writer.flush}
    with pytest.raises(DiskError, match="no space"):
        calls[call]()
    writer.close()  # the error was raised once: closing while it ends the run does not raise it again
    assert found == []


def test_an_error_that_no_call_has_raised_is_raised_at_the_end() -> None:
    writer = BackgroundWriter()
    writer.submit(fail)
    with pytest.raises(DiskError):
        writer.close()


def test_an_error_drops_the_writes_that_wait() -> None:
    go = threading.Event()
    found: list[int] = []
    writer = BackgroundWriter()
    writer.submit(lambda: (go.wait(60), fail()))
    writer.submit(lambda: found.append(1))
    go.set()
    with pytest.raises(DiskError):
        writer.flush()
    writer.close()
    assert found == []


def test_a_closed_writer_takes_nothing() -> None:
    writer = BackgroundWriter()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.submit(lambda: None)

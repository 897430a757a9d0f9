"""One worker process: its messages, its errors during the start, its limits and its end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grpo_mega.workers import json_worker
from grpo_mega.workers.json_worker import JsonWorker, WorkerExitedError

ECHO = """
import os, sys, time
from grpo_mega.workers.time_limit import call_with_alarm
from grpo_mega.workers.worker_main import serve

def prepare(setup):
    if setup == "raise": raise ValueError("bad setup")
    if setup == "exit": os._exit(5)

    def handle(job):
        if job == "exit": os._exit(7)
        if job == "sleep": time.sleep(60)
        if job == "fork": os.fork()
        if job == "alarm": call_with_alarm(0.1, lambda: time.sleep(60))
        if job == "write": os.write(int(sys.argv[1]), b"not JSON\\n")
        if job == "raise": job = call_with_alarm(5.0, lambda: 1 / 0)
        yield job

    return handle

if __name__ == "__main__":
    serve(prepare)
"""


@pytest.fixture(autouse=True)
def echo_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echo_worker.py").write_text(ECHO, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(json_worker, "GRACE_SECONDS", 0.1)


@pytest.fixture
def start_worker() -> Iterator[Callable[..., JsonWorker]]:
    """Return a function that starts a worker with a setup; the workers are killed after the test."""
    workers = []

    def start(setup: object = None) -> JsonWorker:
        workers.append(JsonWorker("echo_worker", setup if setup is not None else {}))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


def test_messages_of_any_size_come_back_in_order(start_worker: Callable[..., JsonWorker]) -> None:
    messages = ["a", {"long": "x" * 3_000_000}, ["\n", None, 1.5]]
    worker = start_worker()
    worker.wait_until_ready()
    for message in messages:
        worker.send(message)
        assert worker.wait_for_message(60.0) == message
    assert worker.backlog == b""


def test_an_error_of_the_setup_is_reported(start_worker: Callable[..., JsonWorker]) -> None:
    worker = start_worker("raise")
    with pytest.raises(RuntimeError, match="ValueError: bad setup"):
        worker.wait_until_ready()


def test_an_exit_during_the_start_has_its_status(start_worker: Callable[..., JsonWorker]) -> None:
    worker = start_worker("exit")
    with pytest.raises(WorkerExitedError) as caught:
        worker.wait_until_ready()
    assert caught.value.status == 5


def test_a_start_that_takes_too_long_is_an_error(
    monkeypatch: pytest.MonkeyPatch, start_worker: Callable[..., JsonWorker]
) -> None:
    monkeypatch.setattr(json_worker, "START_SECONDS", 0.0)
    worker = start_worker()
    with pytest.raises(RuntimeError, match="not ready within 0 s"):
        worker.wait_until_ready()


@pytest.mark.parametrize(("job", "status"), [("exit", 7), ("alarm", -signal.SIGALRM)])
def test_an_exit_during_a_job_has_its_status(job: str, status: int, start_worker: Callable[..., JsonWorker]) -> None:
    worker = start_worker()
    worker.wait_until_ready()
    worker.send(job)
    with pytest.raises(WorkerExitedError) as caught:
        worker.wait_for_message(60.0)
    assert (caught.value.status, worker.is_alive) == (status, False)


def test_a_worker_that_does_not_answer_is_a_timeout(start_worker: Callable[..., JsonWorker]) -> None:
    worker = start_worker()
    worker.wait_until_ready()
    worker.send("sleep")
    with pytest.raises(TimeoutError):
        worker.wait_for_message(0.2)
    assert worker.kill() == -signal.SIGKILL


def test_an_exception_in_a_job_is_its_problem(start_worker: Callable[..., JsonWorker]) -> None:
    worker = start_worker()
    worker.wait_until_ready()
    worker.send("raise")
    assert worker.wait_for_message(60.0) == [None, "ZeroDivisionError: division by zero"]


def test_a_forked_process_sends_no_second_answer(start_worker: Callable[..., JsonWorker]) -> None:
    worker = start_worker()
    worker.wait_until_ready()
    for message in ["fork", "a", "fork", "b"]:
        worker.send(message)
        assert worker.wait_for_message(60.0) == message


def test_a_line_that_is_not_a_message_ends_the_worker_with_the_reason(start_worker: Callable[..., JsonWorker]) -> None:
    worker = start_worker()
    worker.wait_until_ready()
    worker.send("write")
    with pytest.raises(WorkerExitedError, match="contained b'not JSON'") as caught:
        worker.wait_for_message(60.0)
    assert (caught.value.status, worker.is_alive) == (-signal.SIGKILL, False)


class Pieces:
    """A connection that brings one piece per read, and between pieces has nothing."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = [part for piece in pieces for part in (piece, None)]

    def recv(self, num_bytes: int) -> bytes:
        part = self.pieces.pop(0)
        if part is None:
            raise BlockingIOError
        return part


@pytest.fixture
def received(start_worker: Callable[..., JsonWorker]) -> Iterator[JsonWorker]:
    worker = start_worker()
    worker.wait_until_ready()
    own = worker.connection
    yield worker
    worker.connection = own


def test_pieces_of_an_incomplete_line_are_not_joined_again_at_each_read(received: JsonWorker) -> None:
    pieces = [b'"', *[bytes([97 + i % 26]) * 1000 for i in range(50)]]
    received.connection = Pieces([*pieces, b'"\n[1]\n"re', b'st"\n'])  # type: ignore[assignment]
    for _ in pieces:
        assert received.receive() == ([], True)
    assert [id(kept) for kept in received._incoming] == [id(piece) for piece in pieces]
    assert received.receive() == ([b"".join(pieces[1:]).decode(), [1]], True)
    assert received.receive() == (["rest"], True)


def test_a_line_without_an_end_is_rejected_before_it_fills_the_memory(
    received: JsonWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_worker, "_MAX_MESSAGE_BYTES", 2500)
    received.connection = Pieces([b"x" * 1000] * 3)  # type: ignore[assignment]
    assert [received.receive()[1] for _ in range(3)] == [True, True, False]
    assert "contained b'xxx" in str(received.invalid_message)


def test_a_worker_that_never_stops_writing_does_not_hold_up_the_caller(
    received: JsonWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_worker, "_MAX_PIECES", 3)
    endless = Pieces([])
    endless.pieces = [b'"a"\n'] * 10
    received.connection = endless  # type: ignore[assignment]
    assert received.receive() == (["a"] * 3, True)

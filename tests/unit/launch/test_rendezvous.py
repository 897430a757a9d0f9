"""Machines join a rendezvous in any order, and each receives the first failure of another."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from grpo_mega.launch.rendezvous import JsonSocket, NodeInfo, Rendezvous, RendezvousError, rendezvous
from grpo_mega.parallel.ports import free_port
from grpo_mega.types import UserError

HERE = "127.0.0.1"


def node_info(node_rank: int, num_nodes: int = 2, num_ranks: int = 2) -> NodeInfo:
    return NodeInfo(node_rank, num_nodes, num_ranks, f"host{node_rank}")


def run_later(action: Callable[[], Rendezvous], delay: float = 0.0) -> Future[Rendezvous]:
    """Run `action` in another thread after `delay` seconds."""
    future: Future[Rendezvous] = Future()

    def run() -> None:
        time.sleep(delay)
        try:
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def join_all(*machines: NodeInfo, limit: float = 10.0, delay: float = 0.0) -> list[Future[Rendezvous]]:
    port = free_port()
    return [run_later(lambda m=m: rendezvous(m, HERE, port, limit), delay * i) for i, m in enumerate(machines)]  # type: ignore[misc]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_machines_join_in_any_order(order: tuple[int, ...]) -> None:
    joined = join_all(*(node_info(i, 3) for i in order), delay=0.3)
    for meeting in [future.result(20) for future in joined]:
        with meeting:
            pass


def failures_of(meeting: Rendezvous) -> queue.SimpleQueue[tuple[int, str]]:
    received: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    meeting.watch(lambda code, text: received.put((code, text)))
    return received


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_reaches_every_other_machine_with_its_code_and_text(failing: int) -> None:
    meetings = [future.result(20) for future in join_all(*(node_info(i, 3) for i in range(3)))]
    received = [failures_of(meeting) for meeting in meetings]
    meetings[failing].report_failure(2, "rank 4: data.train=x is missing\n")
    for i, queued in enumerate(received):
        if i != failing:
            assert queued.get(timeout=5) == (2, "rank 4: data.train=x is missing\n")
    assert received[failing].empty()


def test_only_a_machine_that_closes_its_connection_without_a_message_has_failed() -> None:
    meetings = [future.result(20) for future in join_all(*(node_info(i, 3) for i in range(3)))]
    received = [failures_of(meeting) for meeting in meetings]
    with meetings[1]:
        pass
    time.sleep(0.2)
    assert received[0].empty()
    for connection in meetings[2]._connections.values():  # as the kernel does when the process is killed
        connection.close()
    code, text = received[0].get(timeout=5)
    assert code == 1
    assert "machine 2 (host2) is gone" in text


def test_a_wrong_master_addr_is_named_when_the_limit_has_passed() -> None:
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"MASTER_ADDR=no-such-host\.invalid, port 29500: .* within 1 s .*NODE_RANK=0"):
        rendezvous(node_info(1), "no-such-host.invalid", 29500, 1.0)
    port = free_port()
    with pytest.raises(UserError, match=rf"MASTER_ADDR={HERE}, port {port}: .*Connection refused"):
        rendezvous(node_info(1), HERE, port, 1.0)
    assert time.monotonic() - begin < 30


def test_another_program_at_the_address_is_reported() -> None:
    def answer(server: socket.socket) -> None:
        while True:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server((HERE, 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        with pytest.raises(UserError, match="another program answers there"):
            rendezvous(node_info(1), HERE, server.getsockname()[1], 0.5)


def test_machine_0_names_the_missing_machines() -> None:
    port = free_port()
    with pytest.raises(RendezvousError, match=rf"NODE_RANK 1, 2 of 3 machines .* MASTER_ADDR=host0, port {port}"):
        rendezvous(node_info(0, 3), "host0", port, 1.0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (node_info(1, num_ranks=4), r"machine 0 \(host0\) has 2 ranks and machine 1 \(host1\) has 4"),
        (node_info(0), "NODE_RANK=0 on host0 and on host0"),
        (node_info(1, num_nodes=3), "NNODES=2 on machine 0 .* but NNODES=3 on machine 1"),
    ],
)
def test_machine_0_rejects_machines_with_contradicting_settings(other: NodeInfo, message: str) -> None:
    port = free_port()
    host = run_later(lambda: rendezvous(node_info(0), HERE, port, 10.0))
    deadline = time.monotonic() + 5
    while True:
        try:
            connection = JsonSocket(socket.create_connection((HERE, port)))
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    connection.send(other.__dict__)
    with pytest.raises(UserError, match=message):
        host.result(10)
    answer = connection.receive(5)
    assert answer is not None
    assert answer["input"] is True


def test_a_rejected_machine_reports_the_reason_too() -> None:
    joined = join_all(node_info(0), node_info(1, num_ranks=4))
    for future in joined:
        with pytest.raises(UserError, match="the same number"):
            future.result(20)

"""The encrypted connection between a job and an engine server: who is accepted, and how each fault is reported."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from unittest import mock

import pytest

from grpo_mega.engines.server import client as client_module
from grpo_mega.engines.server import connection as connection_module
from grpo_mega.engines.server import listener as listener_module
from grpo_mega.engines.server import protocol
from grpo_mega.engines.server.client import ServerClient
from grpo_mega.engines.server.connection import ServerConnection, open_connection
from grpo_mega.engines.server.listener import ServerListener
from grpo_mega.engines.server.messages import (
    ClaimAccepted,
    ClaimServer,
    CommandDone,
    CommandFailed,
    EndJob,
    Heartbeat,
    JobEnded,
    PushCommand,
    ServerBusy,
    ServerMessage,
)
from grpo_mega.engines.server.protocol import Address, ConnectionFailedError, NamedServer, WrongPeerError, curve_keys
from tests.helpers.stub_server import FACTS

SECRET = b"a secret of this test"


class LocalServer:
    """A listener of this process, and the commands that it received."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        bound = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.address = Address(host, bound.getsockname()[1])
        self.listener = ServerListener(bound, SECRET, FACTS, lambda: 7)
        self.listener.open()
        self.commands = self.listener.commands(5.0)


@pytest.fixture
def server() -> Iterator[LocalServer]:
    local = LocalServer()
    yield local
    local.listener.close()


@pytest.fixture
def silent() -> Iterator[tuple[socket.socket, Address]]:
    """A program that accepts connections and never sends anything."""
    with closing(socket.create_server(("127.0.0.1", 0))) as bound:
        yield bound, Address("127.0.0.1", bound.getsockname()[1])


def connect_and_claim(server: LocalServer) -> ServerConnection:
    connection, status = open_connection(server.address, SECRET)
    assert (status.facts, status.job) == (FACTS, None)
    connection.send(ClaimServer("job 1"))
    assert connection.receive() == ClaimAccepted()
    return connection


def receive_to_the_end(job: ServerConnection) -> list[ServerMessage]:
    """All messages but heartbeats, until the server closes the connection."""
    received: list[ServerMessage] = []

    def receive_all() -> None:
        while True:
            received.append(job.receive(5.0))

    with pytest.raises(ConnectionFailedError, match="closed the connection"):
        receive_all()
    return [message for message in received if not isinstance(message, Heartbeat)]


def test_messages_arrive_whole_and_in_order(server: LocalServer) -> None:
    job = connect_and_claim(server)
    for version in range(3):
        job.send(PushCommand(version, True))
    assert [next(server.commands) for _ in range(3)] == [PushCommand(version, True) for version in range(3)]
    big = "x" * 5_000_000
    server.listener.answer(CommandFailed(big))
    server.listener.answer(CommandDone())
    received = [message for message in (job.receive() for _ in range(4)) if not isinstance(message, Heartbeat)][:2]
    assert received == [CommandFailed(big), CommandDone()]
    job.close()
    job.close()
    with pytest.raises(ConnectionFailedError, match="is disconnected"):
        job.send(EndJob())


def test_messages_that_were_not_read_for_a_while_are_no_silence_of_the_server(server: LocalServer) -> None:
    """The job reads nothing while it sends the weights, which may take longer than a server may be silent."""
    with mock.patch.object(client_module, "_SILENT_SECONDS", 0.1):
        job = ServerClient(
            [NamedServer("s", "", server.address)], SECRET, FACTS, patience_seconds=5.0, timeout_seconds=5.0
        )
        job.start(PushCommand(1, True))
        assert next(server.commands) == PushCommand(1, True)
        server.listener.answer(CommandDone())
        time.sleep(0.3)
        job.start(PushCommand(2, True))
        assert next(server.commands) == PushCommand(2, True)
        job.close()


def test_an_ipv6_address_is_served() -> None:
    local = LocalServer("::1")
    connection, _ = open_connection(local.address, SECRET)
    connection.close()
    local.listener.close()


@pytest.mark.parametrize("token", [b"", b"another secret of this test"])
def test_another_secret_is_rejected_by_both_sides(
    server: LocalServer, token: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(WrongPeerError, match="has another secret, or is not an engine server"):
        open_connection(server.address, token)
    end = time.monotonic() + 5.0
    while "rejected connections: 1 with another secret" not in caplog.text:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_client_that_only_knows_the_key_of_the_server_is_rejected(server: LocalServer) -> None:
    def keys(token: bytes, side: protocol.Side) -> tuple[bytes, bytes]:
        return curve_keys(token if side == "server" else b"another secret", side)

    with (
        mock.patch.object(connection_module, "curve_keys", keys),
        pytest.raises(WrongPeerError, match="has another secret"),
    ):
        open_connection(server.address, SECRET)


def test_neither_the_secret_nor_a_message_is_sent_in_plain_text(server: LocalServer) -> None:
    """A proxy between both sides records every byte."""
    recorded = bytearray()
    with closing(socket.create_server(("127.0.0.1", 0))) as proxy:

        def forward(source: socket.socket, target: socket.socket) -> None:
            while data := source.recv(65536):
                recorded.extend(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

        def accept() -> None:
            inner, _ = proxy.accept()
            outer = socket.create_connection((server.address.host, server.address.port))
            threading.Thread(target=forward, args=(inner, outer), daemon=True).start()
            forward(outer, inner)

        threading.Thread(target=accept, daemon=True).start()
        connection, _ = open_connection(Address("127.0.0.1", proxy.getsockname()[1]), SECRET)
        connection.send(ClaimServer("the name of this job"))
        assert connection.receive() == ClaimAccepted()
        connection.close()
    assert len(recorded) > 500
    for text in (SECRET, SECRET.hex().encode(), b"the name of this job", *curve_keys(SECRET, "server")):
        assert text not in recorded


def test_another_protocol_version_is_named_by_the_job(server: LocalServer) -> None:
    with (
        mock.patch.object(listener_module, "PROTOCOL", 7),
        pytest.raises(WrongPeerError, match=r"has protocol version 7, and this side has version \d"),
    ):
        open_connection(server.address, SECRET)


def test_a_program_that_is_not_an_engine_server_is_named(silent: tuple[socket.socket, Address]) -> None:
    def answer() -> None:
        connection, _ = silent[0].accept()
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100)

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(WrongPeerError, match="is not an engine server of this program"):
        open_connection(silent[1], SECRET)


def test_a_program_that_is_not_a_job_leaves_the_server_working(server: LocalServer) -> None:
    with closing(socket.create_connection((server.address.host, server.address.port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: engine\r\n\r\n" + b"x" * 100)
        with suppress(ConnectionResetError):
            while stranger.recv(1000):
                pass
    connect_and_claim(server).close()


def test_a_silent_program_and_a_closed_port_are_reported_in_time(silent: tuple[socket.socket, Address]) -> None:
    connection = ServerConnection("127.0.0.1", silent[1].port, SECRET)
    with pytest.raises(ConnectionFailedError, match=r"did not answer within 0\.1 s"):
        connection.receive(0.1)
    connection.close()
    with pytest.raises(ConnectionFailedError, match="rejected the connection"):
        open_connection(Address("127.0.0.1", 9), SECRET)
    with pytest.raises(OSError, match=r"not known|resolution"):
        open_connection(Address("no-such-host.invalid", 9), SECRET)


def test_a_frame_above_the_limit_is_rejected(server: LocalServer) -> None:
    job = connect_and_claim(server)
    job._socket.send(b"x" * (protocol._MAX_FRAME_BYTES + 1))
    assert receive_to_the_end(job) == []
    assert isinstance(next(server.commands), JobEnded)


@pytest.fixture
def patient() -> Iterator[LocalServer]:
    """A server that waits ten minutes for a handshake, so that another reason closes connections in a test."""
    with mock.patch.object(protocol, "HANDSHAKE_SECONDS", 600.0):
        local = LocalServer()
    yield local
    local.listener.close()


def read_to_the_end(stranger: socket.socket) -> None:
    """Return when the server has closed the connection; fail after 60 s."""
    stranger.settimeout(60.0)
    with suppress(ConnectionResetError):
        while stranger.recv(1000):
            pass


def test_a_client_cannot_make_the_server_buffer_a_large_frame_before_it_is_authenticated(patient: LocalServer) -> None:
    """The client starts the handshake of ZMTP 3.0 with CURVE, then sends the header of a command of 2 MiB."""
    start = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\x00") + bytes(32)
    with closing(socket.create_connection((patient.address.host, patient.address.port))) as stranger:
        stranger.sendall(start + b"\x06" + (2 << 20).to_bytes(8, "big"))
        read_to_the_end(stranger)
    connect_and_claim(patient).close()


def test_connections_above_the_limit_are_closed_and_the_job_is_served(patient: LocalServer) -> None:
    with mock.patch.object(listener_module, "_MAX_CONNECTIONS", 3), ExitStack() as strangers:
        job = connect_and_claim(patient)
        for _ in range(2):
            strangers.enter_context(socket.create_connection((patient.address.host, patient.address.port)))
        last = strangers.enter_context(socket.create_connection((patient.address.host, patient.address.port)))
        read_to_the_end(last)
        job.send(PushCommand(1, True))
        assert next(patient.commands) == PushCommand(1, True)
        strangers.close()
        end = time.monotonic() + 60.0
        while True:  # until the server has noticed that the others are gone
            try:
                open_connection(patient.address, SECRET)[0].close()
            except ConnectionFailedError:
                assert time.monotonic() < end
            else:
                break
        job.close()


def test_rejected_connections_are_logged_once_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    count = listener_module.RejectionCount()
    for now in (100.0, 101.0, 102.0, 159.0):
        count.add(now)
    count.report(161.0)
    count.report(300.0)
    assert [record.args for record in caplog.records] == [(1, 64), (3, 64)]


def test_a_message_that_the_server_cannot_read_is_answered_and_frees_the_server(server: LocalServer) -> None:
    job = connect_and_claim(server)
    job._socket.send(b"\xc1")
    while isinstance(failure := job.receive(5.0), Heartbeat):
        pass
    assert isinstance(failure, CommandFailed)
    assert "this server cannot read the message" in failure.reason
    assert next(server.commands) == JobEnded("sent a message that this version cannot read")
    job.close()


def test_a_job_that_is_gone_frees_the_server(server: LocalServer) -> None:
    first = connect_and_claim(server)
    second, status = open_connection(server.address, SECRET)
    assert status.job is not None
    assert status.job.startswith("job 1 (127.0.0.1")
    second.send(ClaimServer("job 2"))
    assert second.receive() == ServerBusy(status.job, is_ending=False)
    first.close()  # as a killed process: sends no EndJob
    assert next(server.commands) == JobEnded("closed the connection")
    with pytest.raises(ConnectionFailedError, match="the job closed the connection"):
        server.listener.check_job()
    second.send(ClaimServer("job 2"))
    assert second.receive() == ServerBusy(status.job, is_ending=True)  # until the engine's thread has finished
    server.commands = server.listener.commands(0.01)
    assert next(server.commands) is None


def test_a_server_that_exits_delivers_its_last_message(server: LocalServer) -> None:
    job = connect_and_claim(server)
    server.listener.answer(CommandFailed("no more memory"))
    server.listener.close()
    assert receive_to_the_end(job) == [CommandFailed("no more memory")]


def test_an_idle_server_sends_its_steps(server: LocalServer) -> None:
    job = connect_and_claim(server)
    assert job.receive(5.0) == Heartbeat(7)
    job.close()


def test_commands_without_a_claim_are_ignored(server: LocalServer, tmp_path: Path) -> None:
    stranger, _ = open_connection(server.address, SECRET)
    stranger.send(PushCommand(1, True))
    job = connect_and_claim(server)
    job.send(PushCommand(2, True))
    assert next(server.commands) == PushCommand(2, True)
    stranger.close()
    job.close()

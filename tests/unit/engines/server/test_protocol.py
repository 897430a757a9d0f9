"""What a job and an engine server say to each other: whole, in order, and only to who knows the secret."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest

from grpo_mega.engines.server import protocol
from grpo_mega.engines.server.protocol import Address, Connection, ConnectionFailedError, read_token, require_token
from grpo_mega.types import UserError

SECRET = b"a secret of this test"


class Sockets:
    """Two connected sockets of this machine."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.job = socket.create_connection(listener.getsockname())
            self.server, _ = listener.accept()


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    both = Sockets()
    with closing(both.job), closing(both.server):
        yield both


def greeted(
    sockets: Sockets, job: bytes = SECRET, server: bytes = SECRET
) -> tuple[Connection, Connection, dict[str, str]]:
    """Both sides after their greeting, and what each said of the other."""
    sides = Connection(sockets.job, "job", 5.0), Connection(sockets.server, "server", 5.0)
    told: dict[str, str] = {}

    def handshake(name: str, side: Connection, secret: bytes) -> None:
        try:
            side.handshake(secret)
        except ConnectionFailedError as error:
            told[name] = str(error)

    thread = threading.Thread(target=handshake, args=("server", sides[1], server))
    thread.start()
    handshake("job", sides[0], job)
    thread.join()
    return *sides, told


def test_what_is_sent_arrives_whole_and_in_order(sockets: Sockets) -> None:
    job, server, _ = greeted(sockets)
    big = bytes(range(256)) * 20000
    sender = threading.Thread(
        target=lambda: [job.send("n", {"i": i, "x": 0.1, "text": "ä\n"}, [b"", big]) for i in range(3)]
    )
    sender.start()
    for i in range(3):
        message = server.receive()
        assert (message.kind, message.fields) == ("n", {"i": i, "x": 0.1, "text": "ä\n"})
        assert message.blobs == (b"", big)
    sender.join()
    server.send("done")
    assert job.waits(5.0)
    assert job.receive() == protocol.ServerMessage("done")
    assert not job.waits(0.0)


def test_another_secret_is_noticed_by_both_sides(sockets: Sockets) -> None:
    why = "does not know the same secret"
    assert greeted(sockets, job=b"another secret of this test")[2] == {"job": why, "server": why}


def test_the_secret_does_not_travel(sockets: Sockets) -> None:
    sent: list[bytes] = []
    real = Connection._read

    def heard(self: Connection, num_bytes: int) -> bytes:
        sent.append(real(self, num_bytes))
        return sent[-1]

    with mock.patch.object(Connection, "_read", heard):
        greeted(sockets)
    assert sum(map(len, sent)) > 300
    assert not any(SECRET in part or SECRET.hex().encode() in part for part in sent)


@pytest.mark.parametrize("fault", ["changed", "repeated", "left out"])
def test_a_stranger_on_the_way_is_noticed(sockets: Sockets, fault: str) -> None:
    job, server, _ = greeted(sockets)
    parts: list[bytes] = []
    with mock.patch.object(job, "_socket", mock.Mock(sendall=parts.append)):
        job.send("push", {"version": 3})
        job.send("push", {"version": 4})
    if fault == "changed":
        sockets.job.sendall(parts[0].replace(b'"version": 3', b'"version": 8'))
    elif fault == "left out":
        sockets.job.sendall(parts[1])
    else:
        sockets.job.sendall(parts[0] + parts[0])
        assert server.receive().fields == {"version": 3}
    with pytest.raises(ConnectionFailedError, match="changed on its way, or is not its own"):
        server.receive()


def test_strangers_are_not_listened_to_for_long(sockets: Sockets) -> None:
    server = Connection(sockets.server, "server", 0.2)
    sockets.job.sendall(b"GET / HTTP/1.1\r\nHost: engine\r\n\r\n")
    with pytest.raises(ConnectionFailedError, match="which is more than is taken"):
        server.handshake(SECRET)


def test_silence_and_the_end_are_told_apart(sockets: Sockets) -> None:
    job, server, _ = greeted(sockets)
    server._timeout = 0.1
    sockets.server.settimeout(0.1)
    sockets.job.sendall(b"\0")
    with pytest.raises(ConnectionFailedError, match=r"stands still: no message came to its end within 0\.1 s"):
        server.receive()
    job.close()
    with pytest.raises(ConnectionFailedError, match="has ended its connection"):
        server.receive()


def test_another_protocol_is_named(sockets: Sockets) -> None:
    server = Connection(sockets.server, "server", 5.0)
    with mock.patch.object(protocol, "PROTOCOL", 7):
        Connection(sockets.job, "job", 5.0).send(
            "greeting", {"program": "grpo_mega engines", "protocol": 7, "nonce": ""}
        )
    with pytest.raises(ConnectionFailedError, match="speaks version 7 of the protocol, this side 1"):
        server.handshake(SECRET)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("node3:7000", Address("node3", 7000)),
        ("127.0.0.1:65535", Address("127.0.0.1", 65535)),
        ("[::1]:70", Address("::1", 70)),
    ],
)
def test_addresses(url: str, found: Address) -> None:
    assert Address.parse(url, "engine.urls[0]") == found
    assert found.is_loopback == (found.host != "node3")


@pytest.mark.parametrize("url", ["", "node3", "node3:", ":7000", "node3:0", "node3:65536", "http://node3:7000", "a:-1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError) as caught:
        Address.parse(url, "engine.urls[1]")
    assert str(caught.value) == f"engine.urls[1]={url} is no address; write host:port, as the server prints it"


def test_the_secret_is_read_from_a_variable_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef\n")
    assert read_token({}) == b""
    assert read_token({protocol.TOKEN_VARIABLE: "0123456789abcdef"}) == b"0123456789abcdef"
    assert read_token({protocol.TOKEN_FILE_VARIABLE: str(tmp_path / "token")}) == b"0123456789abcdef"
    with pytest.raises(UserError, match="has 5 characters; use at least 16"):
        read_token({protocol.TOKEN_VARIABLE: "short"})
    with pytest.raises(UserError, match=r"GRPO_MEGA_SERVER_TOKEN_FILE=.*nowhere cannot be read"):
        read_token({protocol.TOKEN_FILE_VARIABLE: str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="are both set"):
        read_token({protocol.TOKEN_VARIABLE: "0123456789abcdef", protocol.TOKEN_FILE_VARIABLE: str(tmp_path / "token")})


def test_only_this_machine_is_served_without_a_secret() -> None:
    for host in ("localhost", "127.0.0.1", "::1"):
        require_token(host, b"", "engine.urls[0]")
    require_token("0.0.0.0", SECRET, "--host")
    with pytest.raises(UserError, match="--host is reached from other machines and there is no secret; set GRPO_MEGA"):
        require_token("0.0.0.0", b"", "--host")

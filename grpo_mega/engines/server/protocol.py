"""Messages between a job and an engine server over TCP, between two that know the same secret.

A message is a kind, fields (JSON) and blobs of bytes; nothing that is read can call anything. Both sides prove first
that they know the secret, without sending it; from then on every message carries a code made with it and a count, so
that a stranger can neither speak nor change, repeat or leave out a message. What is said is not hidden.
Asserted by tests/unit/engines/server/test_protocol.py.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import select
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grpo_mega.types import UserError

PROTOCOL = 1
"""Of the messages; both sides must speak the same."""
TOKEN_VARIABLE = "GRPO_MEGA_SERVER_TOKEN"
TOKEN_FILE_VARIABLE = "GRPO_MEGA_SERVER_TOKEN_FILE"

_LEAST_TOKEN_CHARACTERS = 16
_SIZES = struct.Struct(">IQ")  # bytes of the JSON, of all blobs
_CODE_BYTES = hashlib.sha256().digest_size
_GREETING_BYTES = 4096  # of a message of somebody who has not proven to know the secret
_MOST_BYTES = 1 << 32
# A lost machine is noticed within a minute: the first three where nothing is said, the last where nothing is confirmed.
_KEEP_ALIVE = (
    (socket.TCP_KEEPIDLE, 20),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 4),
    (socket.TCP_USER_TIMEOUT, 60_000),
)

Side = Literal["job", "server"]


class ConnectionFailedError(RuntimeError):
    """The other side is gone, stands still, or is not who it should be."""


class WrongPeerError(ConnectionFailedError):
    """The other side answers, and will never be who it should be."""


@dataclass(frozen=True)
class ServerMessage:
    """`kind` says what the fields are."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    blobs: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, url: str, key: str) -> Address:
        """Of `host:port`, `[::1]:port`. `key` names the setting in messages.

        Raises:
            UserError: it is something else.
        """
        host, _, port = url.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or "/" in url or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"{key}={url} is no address", remedy="write host:port, as the server prints it")
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Only processes of this machine reach it."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Is it a name of this machine that others do not reach?"""
    return host in ("localhost", "::1") or host.startswith("127.")


def read_token(env: Mapping[str, str] = os.environ) -> bytes:
    """The secret that jobs and servers share; empty where none is set.

    Raises:
        UserError: the file cannot be read, both variables are set, or the secret is short.
    """
    path, token = env.get(TOKEN_FILE_VARIABLE), env.get(TOKEN_VARIABLE)
    if path and token:
        raise UserError(f"{TOKEN_VARIABLE} and {TOKEN_FILE_VARIABLE} are both set", remedy="use one of them")
    if path:
        try:
            token = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{TOKEN_FILE_VARIABLE}={path} cannot be read ({error})", remedy="name a file that holds the secret"
            ) from error
    if not token:
        return b""
    if len(token) < _LEAST_TOKEN_CHARACTERS:
        raise UserError(
            f"the secret of {TOKEN_VARIABLE} or its file has {len(token)} characters",
            remedy=f"use at least {_LEAST_TOKEN_CHARACTERS}, for example of: openssl rand -hex 32",
        )
    return token.encode()


def require_token(host: str, token: bytes, what: str) -> None:
    """Raises UserError: `what` is reached from other machines, and there is no secret."""
    if not token and not is_loopback(host):
        raise UserError(
            f"{what} is reached from other machines and there is no secret",
            remedy=f"set {TOKEN_VARIABLE}, or {TOKEN_FILE_VARIABLE} to the path of a file, to the same on both sides",
        )


class Connection:
    """One side of a connection. Sending is for any thread, receiving for one."""

    def __init__(self, connection: socket.socket, side: Side, timeout_seconds: float) -> None:
        """`timeout_seconds`: of a message that has begun, to come or to go."""
        self._socket, self._side, self._timeout = connection, side, timeout_seconds
        connection.settimeout(timeout_seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._sending = threading.Lock()
        self._keys: dict[Side, bytes] = {"job": b"", "server": b""}
        self._sent = self._received = 0
        self._most_bytes = _GREETING_BYTES

    @property
    def here(self) -> str:
        """This machine's address on this connection."""
        return str(self._socket.getsockname()[0])

    @property
    def peer(self) -> str:
        """The other side's address."""
        return str(self._socket.getpeername()[0])

    def set_timeout(self, seconds: float) -> None:
        """Of messages from now on."""
        self._timeout = seconds
        self._socket.settimeout(seconds)

    def handshake(self, token: bytes) -> None:
        """Both sides call it first.

        Raises:
            WrongPeerError: the other side speaks another protocol, or does not know the same secret.
            ConnectionFailedError: it is gone, or stands still.
        """
        mine = secrets.token_hex(16)
        self.send("greeting", {"program": "grpo_mega engines", "protocol": PROTOCOL, "nonce": mine})
        theirs = self.receive()
        if theirs.kind != "greeting" or theirs.fields.get("program") != "grpo_mega engines":
            raise WrongPeerError("is no engine server of this program")
        if theirs.fields.get("protocol") != PROTOCOL:
            raise WrongPeerError(
                f"speaks version {theirs.fields.get('protocol')} of the protocol, this side {PROTOCOL}"
            )
        nonces = {self._side: mine, self._other: str(theirs.fields.get("nonce"))}
        both = f"{nonces['job']} {nonces['server']}"

        def code(purpose: str) -> bytes:
            return hmac.new(token, f"{purpose} {both}".encode(), hashlib.sha256).digest()

        self.send("proof", {"proof": code(self._side).hex()})
        proof = str(self.receive().fields.get("proof"))
        if not hmac.compare_digest(proof.encode(), code(self._other).hex().encode()):
            raise WrongPeerError("does not know the same secret")
        self._keys = {"job": code("from job"), "server": code("from server")}
        self._sent = self._received = 0
        self._most_bytes = _MOST_BYTES

    def send(self, kind: str, fields: Mapping[str, Any] | None = None, blobs: Sequence[bytes] = ()) -> None:
        """Raises ConnectionFailedError: the other side is gone, or takes nothing."""
        text = json.dumps({"kind": kind, "fields": dict(fields or {}), "blobs": [len(blob) for blob in blobs]}).encode()
        body = _SIZES.pack(len(text), sum(map(len, blobs))) + text + b"".join(blobs)
        with self._sending:
            try:
                self._socket.sendall(body + self._code(self._side, self._sent, body))
            except TimeoutError as error:
                raise ConnectionFailedError(f"took no message for {self._timeout:g} s") from error
            except OSError as error:
                raise ConnectionFailedError(f"has ended its connection ({error})") from error
            self._sent += 1

    def waits(self, seconds: float) -> bool:
        """Is there a message, or the end of the connection, within so many seconds?"""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(max(0.0, seconds) * 1000))

    def receive(self) -> ServerMessage:
        """The next message.

        Raises:
            ConnectionFailedError: the connection has ended, the message does not come to its end, or is not the other
            side's.
        """
        head = self._read(_SIZES.size)
        num_text, num_blobs = _SIZES.unpack(head)
        if num_text + num_blobs > self._most_bytes:
            raise WrongPeerError(f"sends a message of {num_text + num_blobs} bytes, which is more than is taken")
        body = self._read(num_text + num_blobs + _CODE_BYTES)
        code = body[-_CODE_BYTES:]
        if not hmac.compare_digest(code, self._code(self._other, self._received, head + body[:-_CODE_BYTES])):
            raise WrongPeerError("sent a message that was changed on its way, or is not its own")
        self._received += 1
        try:
            told = json.loads(body[:num_text])
            kind, fields, sizes = str(told["kind"]), dict(told["fields"]), [int(size) for size in told["blobs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConnectionFailedError("sent something that is no message") from error
        if sum(sizes) != num_blobs or min(sizes, default=0) < 0:
            raise ConnectionFailedError("sent something that is no message")
        blobs, at = [], num_text
        for size in sizes:
            blobs.append(body[at : at + size])
            at += size
        return ServerMessage(kind, fields, tuple(blobs))

    def close(self) -> None:
        """A second call does nothing."""
        self._socket.close()

    @property
    def _other(self) -> Side:
        return "server" if self._side == "job" else "job"

    def _code(self, side: Side, count: int, body: bytes) -> bytes:
        digest = hmac.new(self._keys[side], count.to_bytes(8, "big"), hashlib.sha256)
        digest.update(body)
        return digest.digest()

    def _read(self, num_bytes: int) -> bytes:
        found = bytearray()
        while len(found) < num_bytes:
            try:
                part = self._socket.recv(min(1 << 20, num_bytes - len(found)))
            except TimeoutError as error:
                raise ConnectionFailedError(
                    f"stands still: no message came to its end within {self._timeout:g} s"
                ) from error
            except OSError as error:
                raise ConnectionFailedError(f"has ended its connection ({error})") from error
            if not part:
                raise ConnectionFailedError("has ended its connection")
            found += part
        return bytes(found)

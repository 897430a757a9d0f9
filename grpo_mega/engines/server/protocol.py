"""Addresses, secret, keys and socket options of the connection between a job and an engine server, for both ends.

The connection is ZeroMQ over TCP with CURVE (https://rfc.zeromq.org/spec/26/). Both key pairs are derived from the
shared secret, so each side authenticates the other, and messages are encrypted. Without a secret the keys are derived
from the empty string: anybody can compute them, which is why only loopback addresses are served then.
Asserted by tests/unit/engines/server/test_protocol.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import zmq
from zmq.utils import z85

from grpo_mega.config.rollout_sections import EngineConfig
from grpo_mega.parallel.ports import is_loopback
from grpo_mega.types import UserError

TOKEN_VARIABLE = "GRPO_MEGA_SERVER_TOKEN"
TOKEN_FILE_VARIABLE = "GRPO_MEGA_SERVER_TOKEN_FILE"
HANDSHAKE_SECONDS = 10.0

_MIN_TOKEN_CHARACTERS = 16
_MAX_FRAME_BYTES = 1 << 20  # what a client can make the server buffer before it is authenticated
_FRAME_OVERHEAD_BYTES = 128  # of the encryption
_MAX_UNCONFIRMED_MILLISECONDS = 60_000

Side = Literal["job", "server"]


class ConnectionFailedError(RuntimeError):
    """The other side closed the connection, or did not respond in time."""


class WrongPeerError(ConnectionFailedError):
    """The other side has another secret, another protocol version, or is another program: a retry cannot help."""


@dataclass(frozen=True)
class Address:
    """The address at which a server listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, url: str, key: str) -> Address:
        """Parse `host:port` or `[::1]:port`. `key` is the setting that error messages name.

        Raises:
            UserError: `url` has another form.
        """
        host, _, port = url.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or "/" in url or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"{key}={url} is not an address", remedy="write host:port, as the server prints it")
        try:
            host.encode("idna")
        except UnicodeError as error:
            raise UserError(f"{key}={url} has no valid host name ({error})", remedy="write host:port") from None
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """True if only processes of this machine can connect to this address."""
        return is_loopback(self.host)


@dataclass(frozen=True)
class NamedServer:
    """An engine server that the config names.

    Attributes:
        key: setting that names it, `engine.urls[0]`.
        url: its address as the config writes it.
        address: the same, parsed.
    """

    key: str
    url: str
    address: Address

    @property
    def name(self) -> str:
        """Name for messages: `engine.urls[0]=host:port`."""
        return f"{self.key}={self.url}"


def named_servers(key: str, urls: Sequence[str]) -> list[NamedServer]:
    """Return the servers at the addresses that `key` lists.

    Raises:
        UserError: one is not an address.
    """
    return [NamedServer(f"{key}[{i}]", url, Address.parse(url, f"{key}[{i}]")) for i, url in enumerate(urls)]


def configured_servers(engine: EngineConfig) -> list[NamedServer]:
    """Return the servers of `engine.urls` and `engine.spare_urls`.

    Raises:
        UserError: one is not an address.
    """
    return [*named_servers("engine.urls", engine.urls), *named_servers("engine.spare_urls", engine.spare_urls)]


def read_token(env: Mapping[str, str] = os.environ) -> bytes:
    """Read the secret that jobs and servers share; empty if none is set.

    Raises:
        UserError: the file cannot be read, both variables are set, or the secret is too short.
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
    if len(token) < _MIN_TOKEN_CHARACTERS:
        raise UserError(
            f"the secret of {TOKEN_VARIABLE} or its file has {len(token)} characters",
            remedy=f"use at least {_MIN_TOKEN_CHARACTERS}, for example the output of: openssl rand -hex 32",
        )
    return token.encode()


def require_token(host: str, token: bytes, key: str) -> None:
    """Raise UserError if other machines can connect to `host` and there is no secret. The message starts with `key`."""
    if not token and not is_loopback(host):
        raise UserError(
            f"{key} is reachable from other machines, and no secret is set",
            remedy=f"set {TOKEN_VARIABLE}, or {TOKEN_FILE_VARIABLE} to the path of a file, to the same on both sides",
        )


def curve_keys(token: bytes, side: Side) -> tuple[bytes, bytes]:
    """Derive the CURVE key pair of one side from the shared secret.

    The secret key is BLAKE2b-256(token), personalized with the side's name; the public key follows from it.

    Returns:
        (public key, secret key), both in Z85 encoding, 40 characters.
    """
    seed = hashlib.blake2b(token, digest_size=32, person=f"grpo_mega {side}".encode()).digest()
    secret_key = z85.encode(seed)
    return zmq.curve_public(secret_key), secret_key


def split_frames(data: bytes) -> list[memoryview]:
    """Split a message into the frames of one ZeroMQ multipart message, each within the limit of `configure_socket`.

    The limit of a frame applies to both sides of a connection, and before a client is authenticated. ZeroMQ delivers
    all frames of a message or none.
    """
    size, view = _MAX_FRAME_BYTES - _FRAME_OVERHEAD_BYTES, memoryview(data)
    return [view[start : start + size] for start in range(0, len(view), size)]


def configure_socket(socket: zmq.Socket[bytes]) -> None:
    """Set the options that sockets of both sides share, before they bind or connect.

    TCP keep-alive detects within a minute that a machine is lost: while nothing is sent after 20 s and four probes,
    and while data is unconfirmed after `TCP_MAXRT`. A stopped process keeps its connection; ZeroMQ's own heartbeats
    would close it.
    """
    socket.linger = 0  # what is left is sent only where `close` allows time for it
    socket.ipv6 = True
    socket.sndhwm = socket.rcvhwm = 0  # a full queue would drop messages; a step's rollouts bound them
    socket.maxmsgsize = _MAX_FRAME_BYTES
    socket.handshake_ivl = int(HANDSHAKE_SECONDS * 1000)
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle, socket.tcp_keepalive_intvl, socket.tcp_keepalive_cnt = 20, 10, 4
    socket.setsockopt(zmq.TCP_MAXRT, _MAX_UNCONFIRMED_MILLISECONDS)

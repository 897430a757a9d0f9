"""The job's end of the encrypted connection to an engine server. Every wait has a limit.

Asserted by tests/unit/engines/server/test_connection.py.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import socket
import time
from contextlib import suppress

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from grpo_mega.engines.server.messages import (
    PROTOCOL,
    Hello,
    JobMessage,
    ServerMessage,
    ServerStatus,
    decode_server_message,
    encode,
)
from grpo_mega.engines.server.protocol import (
    HANDSHAKE_SECONDS,
    Address,
    ConnectionFailedError,
    WrongPeerError,
    configure_socket,
    curve_keys,
    split_frames,
)

_CLOSE_SECONDS = 1.0  # allowed for messages that were sent just before `close`
_RECONNECT_MILLISECONDS = 600_000  # never in practice: a lost connection is an error before that
_EVENTS = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


@functools.cache
def _process_context(pid: int) -> zmq.Context[zmq.Socket[bytes]]:
    """Return the ZeroMQ context of this process, which must not outlive a fork.

    It is never destroyed: a context that is garbage-collected together with its sockets blocks for ever.
    """
    return zmq.Context()


class ServerConnection:
    """A connection to one server. For one thread only."""

    def __init__(self, host: str, port: int, token: bytes) -> None:
        """Start to connect. `host` is a numeric address; `token` is the shared secret, empty if there is none."""
        self._socket = _process_context(os.getpid()).socket(zmq.DEALER)
        configure_socket(self._socket)
        self._socket.reconnect_ivl = _RECONNECT_MILLISECONDS
        self._socket.curve_serverkey, _ = curve_keys(token, "server")
        self._socket.curve_publickey, self._socket.curve_secretkey = curve_keys(token, "job")
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._is_authenticated = False
        self._fault: ConnectionFailedError | None = None
        self._socket.connect(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")

    def send(self, message: JobMessage) -> None:
        """Queue a message.

        Raises:
            ConnectionFailedError: the connection is lost.
        """
        self.wait(0.0)
        self._socket.send_multipart(split_frames(encode(message)))

    def wait(self, seconds: float) -> bool:
        """Wait until there is a message, at most for `seconds`. Return False if there is none.

        Raises:
            ConnectionFailedError: the connection is lost, and all messages that arrived before were received.
        """
        if self._socket.closed:
            raise ConnectionFailedError("is disconnected")
        end = time.monotonic() + seconds
        while True:
            if self._fault is not None:
                if self._socket.poll(0):
                    return True
                raise self._fault
            left = max(0.0, end - time.monotonic())
            ready = dict(self._poller.poll(math.ceil(left * 1000)))
            if self._monitor in ready:
                self._read_event()
            elif self._socket in ready:
                return True
            elif left == 0.0:
                return False

    def receive(self, timeout_seconds: float = HANDSHAKE_SECONDS) -> ServerMessage:
        """Return the next message.

        Raises:
            ConnectionFailedError: the connection is lost, or there is no message in time.
            WrongPeerError: the message has another format.
        """
        if not self.wait(timeout_seconds):
            raise ConnectionFailedError(f"did not answer within {timeout_seconds:g} s")
        try:
            return decode_server_message(b"".join(self._socket.recv_multipart()))
        except msgspec.DecodeError as error:
            raise WrongPeerError(f"sent a message that this version cannot read ({error})") from error

    def close(self) -> None:
        """Send what is queued, and close. A second call does nothing."""
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close()
            self._socket.close(linger=0 if self._fault is not None else int(_CLOSE_SECONDS * 1000))

    def _read_event(self) -> None:
        event = parse_monitor_message(self._monitor.recv_multipart())
        kind, value = event["event"], event["value"]
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._is_authenticated = True
        elif self._fault is None:
            self._fault = self._explain(kind, value)

    def _explain(self, kind: int, value: int) -> ConnectionFailedError:
        if self._is_authenticated:
            return ConnectionFailedError("closed the connection")
        if kind == zmq.EVENT_CLOSED:
            return ConnectionFailedError("rejected the connection")
        if kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and value == errno.EAGAIN:
            return ConnectionFailedError(f"did not complete the handshake within {HANDSHAKE_SECONDS:g} s")
        return WrongPeerError("has another secret, or is not an engine server of this program")


def open_connection(
    address: Address, token: bytes, seconds: float = HANDSHAKE_SECONDS
) -> tuple[ServerConnection, ServerStatus]:
    """Connect to the server at `address` and exchange greetings, in at most `seconds` after its name is resolved.

    If the name has several addresses, each gets an equal part of the time that is left.

    Raises:
        WrongPeerError: the program there has another secret or another protocol version, or is no engine server.
        ConnectionFailedError: the server does not answer.
        OSError: the host's name cannot be resolved.
    """
    fault = ConnectionFailedError("has no address")
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    end = time.monotonic() + seconds
    for number, (_, _, _, _, resolved) in enumerate(found):
        left = (end - time.monotonic()) / (len(found) - number)
        connection = ServerConnection(str(resolved[0]), address.port, token)
        try:
            return connection, _exchange_greetings(connection, left)
        except ConnectionFailedError as error:
            connection.close()
            fault = error
            if isinstance(error, WrongPeerError):
                break
    raise fault


def _exchange_greetings(connection: ServerConnection, seconds: float) -> ServerStatus:
    end = time.monotonic() + seconds
    with suppress(ConnectionFailedError):  # `receive` reports it
        connection.send(Hello(PROTOCOL))
    hello = connection.receive(max(0.0, seconds))
    if not isinstance(hello, Hello):
        raise WrongPeerError("did not send its protocol version first")
    if hello.protocol != PROTOCOL:
        raise WrongPeerError(f"has protocol version {hello.protocol}, and this side has version {PROTOCOL}")
    status = connection.receive(max(0.0, end - time.monotonic()))
    if not isinstance(status, ServerStatus):
        raise WrongPeerError("did not send its settings")
    return status

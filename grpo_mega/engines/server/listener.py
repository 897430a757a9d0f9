"""The server's end of the connection: accepts clients that know the secret, and serves one job at a time.

One thread owns the ZeroMQ socket; it answers greetings, and queues the commands of the job for the engine's thread.
ZeroMQ reports a connection that is gone when a message is sent to it: the heartbeat of every second finds out.
A client without the secret can hold `_MAX_CONNECTIONS` connections at most, each until the handshake times out, and
make the server buffer one frame (`configure_socket`) on each.
Asserted by tests/parallel/test_servers.py and tests/unit/engines/server/test_connection.py.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from grpo_mega.engines.server.messages import (
    PROTOCOL,
    ClaimAccepted,
    ClaimServer,
    Command,
    CommandFailed,
    EndJob,
    Heartbeat,
    Hello,
    JobEnded,
    JobMessage,
    ServerBusy,
    ServerMessage,
    ServerStatus,
    ServingFacts,
    decode_job_message,
    encode,
)
from grpo_mega.engines.server.protocol import ConnectionFailedError, configure_socket, curve_keys, split_frames

log = logging.getLogger("grpo_mega.engines")

_HEARTBEAT_SECONDS = 1.0
_CLOSE_SECONDS = 2.0  # allowed for messages that were sent just before `close`
_MAX_CONNECTIONS = 64  # at the same time: the job, jobs that wait, and clients that are not authenticated yet
_WARNING_SECONDS = 60.0  # between two log lines that count rejected connections
_HANDSHAKE_FAULTS = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_STOP = b""


@dataclass(frozen=True)
class ServedJob:
    """The job that is served, and the identity of its connection."""

    routing_id: bytes
    name: str


class ServerListener:
    """Listens for jobs, on the first rank of a server.

    Args:
        listener: socket that is bound to the server's address; owned by this object from now on.
        token: the shared secret; empty: none.
        facts: settings that a job must have in common with this server.
        steps: returns the number of engine steps so far, for heartbeats; called in another thread.
    """

    def __init__(self, listener: socket.socket, token: bytes, facts: ServingFacts, steps: Callable[[], int]) -> None:
        self._listener, self._token, self._facts, self._steps = listener, token, facts, steps
        self._commands: queue.SimpleQueue[Command | JobEnded | Exception] = queue.SimpleQueue()
        self._state = threading.Lock()
        self._job: ServedJob | None = None
        self._lost: str | None = None  # why the job is gone; the engine may still execute its last command
        self._sending = threading.Lock()
        self._connections: set[int] = set()  # file descriptors
        self._rejections = RejectionCount()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def open(self) -> None:
        """Accept connections from now on."""
        self._listener.listen()
        self._context = zmq.Context()  # its thread keeps a reference, so it is never garbage-collected
        self._outbox, self._inbox = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._outbox.bind("inproc://replies")
        self._inbox.connect("inproc://replies")
        self._router = self._open_router()
        self._thread.start()

    def close(self) -> None:
        """Send what is queued, and close all connections. A second call does nothing."""
        if not self._thread.is_alive():
            return
        with self._sending:
            self._outbox.send_multipart([_STOP, b""])
        self._thread.join(_CLOSE_SECONDS + 1.0)

    def commands(self, heartbeat_seconds: float) -> Iterator[Command | JobEnded | None]:
        """Yield the commands of one job after the other, without end.

        `JobEnded` follows the last command of each job. None is yielded after `heartbeat_seconds` without a command.

        Raises:
            RuntimeError: the listening thread failed.
        """
        while True:
            try:
                message = self._commands.get(timeout=heartbeat_seconds)
            except queue.Empty:
                yield None
                continue
            if isinstance(message, Exception):
                raise RuntimeError("the listener of this engine server failed") from message
            yield message
            if isinstance(message, JobEnded):
                with self._state:
                    job, self._job, self._lost = self._job, None, None
                assert job is not None, "only a job that was served can end"
                log.info("free: the job of %s %s", job.name, message.reason)

    def answer(self, message: ServerMessage) -> None:
        """Send a message to the job; does nothing if the job is gone."""
        job = self._job
        if job is not None and self._lost is None:
            with self._sending:
                self._outbox.send_multipart([job.routing_id, encode(message)])

    def check_job(self) -> None:
        """Raise ConnectionFailedError if the job is gone."""
        if self._lost is not None:
            raise ConnectionFailedError(f"the job {self._lost}")

    def _open_router(self) -> zmq.Socket[bytes]:
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _SharedSecret(self._token))
        router = self._context.socket(zmq.ROUTER)
        configure_socket(router)
        router.router_mandatory = True
        router.curve_server = True
        router.curve_publickey, router.curve_secretkey = curve_keys(self._token, "server")
        self._monitor = router.get_monitor_socket(_HANDSHAKE_FAULTS | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        host, port = self._address = self._listener.getsockname()[:2]
        router.setsockopt(zmq.USE_FD, self._listener.detach())
        router.bind(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
        return router

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # the engine's thread must end the server: no job could reach it any more
            self._commands.put(error)
        finally:
            self._authenticator.stop()
            self._context.destroy(linger=int(_CLOSE_SECONDS * 1000))

    def _serve(self) -> None:
        poller = zmq.Poller()
        for each in (self._router, self._inbox, self._monitor):
            poller.register(each, zmq.POLLIN)
        next_heartbeat = time.monotonic()
        while True:
            ready = dict(poller.poll(max(0, math.ceil((next_heartbeat - time.monotonic()) * 1000))))
            if self._inbox in ready:
                routing_id, data = self._inbox.recv_multipart()
                if routing_id == _STOP:
                    return
                self._send(routing_id, data)
            if self._monitor in ready:
                self._read_event()
            if self._router in ready:
                self._receive()
            if time.monotonic() >= next_heartbeat:
                next_heartbeat = time.monotonic() + _HEARTBEAT_SECONDS
                self._rejections.report(time.monotonic())
                if self._job is not None and self._lost is None:
                    self._send(self._job.routing_id, encode(Heartbeat(self._steps())))

    def _read_event(self) -> None:
        """Count connections, and close a new one above the limit."""
        event = parse_monitor_message(self._monitor.recv_multipart())
        kind, descriptor = event["event"], event["value"]
        if kind == zmq.EVENT_ACCEPTED:
            self._connections.add(descriptor)
            if len(self._connections) > _MAX_CONNECTIONS:
                _shut_down(descriptor, self._address[1])
        elif kind == zmq.EVENT_DISCONNECTED:
            self._connections.discard(descriptor)
        else:
            self._rejections.add(time.monotonic())

    def _send(self, routing_id: bytes, data: bytes) -> None:
        try:
            self._router.send_multipart([routing_id, *split_frames(data)])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._end_job(routing_id, "closed the connection")

    def _receive(self) -> None:
        frames = self._router.recv_multipart(copy=False)
        routing_id, peer = frames[0].bytes, str(frames[0].get("Peer-Address"))
        try:
            message = decode_job_message(b"".join(frame.bytes for frame in frames[1:]))
        except msgspec.DecodeError as error:
            log.warning("rejected a message from %s: %s", peer, error)
            self._send(routing_id, encode(CommandFailed(f"this server cannot read the message: {error}")))
            self._end_job(routing_id, "sent a message that this version cannot read")
            return
        self._dispatch(routing_id, peer, message)

    def _dispatch(self, routing_id: bytes, peer: str, message: JobMessage) -> None:
        match message:
            case Hello(protocol=protocol):
                self._send(routing_id, encode(Hello(PROTOCOL)))
                if protocol == PROTOCOL:
                    job = self._job
                    self._send(routing_id, encode(ServerStatus(self._facts, None if job is None else job.name)))
            case ClaimServer(job=name):
                self._claim(ServedJob(routing_id, f"{name} ({peer})"))
            case EndJob():
                self._end_job(routing_id, "ended")
            case _ if self._job is not None and self._job.routing_id == routing_id and self._lost is None:
                self._commands.put(message)
            case _:
                log.warning("ignored a command from %s, which has not claimed this server", peer)

    def _claim(self, job: ServedJob) -> None:
        with self._state:
            current, is_ending = self._job, self._lost is not None
            if current is None:
                self._job = job
        if current is not None:
            self._send(job.routing_id, encode(ServerBusy(current.name, is_ending)))
            return
        log.info("serving the job of %s", job.name)
        self._send(job.routing_id, encode(ClaimAccepted()))

    def _end_job(self, routing_id: bytes, reason: str) -> None:
        with self._state:
            if self._job is None or self._job.routing_id != routing_id or self._lost is not None:
                return
            self._lost = reason
        self._commands.put(JobEnded(reason))


class RejectionCount:
    """Logs rejected connections: the first at once, then their number once in a while. Times are monotonic."""

    def __init__(self) -> None:
        self._count, self._next_report = 0, 0.0

    def add(self, now: float) -> None:
        """Count a rejected connection."""
        self._count += 1
        self.report(now)

    def report(self, now: float) -> None:
        """Log the connections that were not logged yet, unless the last line is recent."""
        if self._count and now >= self._next_report:
            log.warning(
                "rejected connections: %d with another secret, not from a job of this program, or above %d at once",
                self._count,
                _MAX_CONNECTIONS,
            )
            self._count, self._next_report = 0, now + _WARNING_SECONDS


def _shut_down(descriptor: int, port: int) -> None:
    """Shut down a connection to `port` that ZeroMQ accepted; ZeroMQ then closes it.

    ZeroMQ may have closed it already and the descriptor may be another file by now, which must not be touched.
    """
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getsockname()[1] == port:
                connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is closed


class _SharedSecret:
    """Credentials provider of the authenticator: accepts the public key that the job's side derives."""

    def __init__(self, token: bytes) -> None:
        self._public_key, _ = curve_keys(token, "job")

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public_key

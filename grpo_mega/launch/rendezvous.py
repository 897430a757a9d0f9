"""Rendezvous of a job's machines before their ranks start, and broadcast of the first failure afterwards.

Machine 0 listens on MASTER_PORT. The other machines retry until the limit, so machines may start in any order.
Mistakes that would hang or fail minutes later are reported here: a wrong MASTER_ADDR, a NODE_RANK given twice, machines
with different numbers of ranks. The listening socket is closed when all machines have joined, because the ranks use the
port then. The connections stay open: the first failure of any machine, with its last lines and its exit code, is sent
to all, and the launchers send each other the states of their ranks (stall_agreement.py). Messages are JSON objects, one
per line. Imports no torch. Tests: tests/unit/launch/test_rendezvous.py.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from grpo_mega.types import UserError

_ANSWER_SECONDS = 5.0  # limit for a connection, and for the first message on it
_RETRY_SECONDS = 1.0
_REMIND_SECONDS = 30.0  # between two lines that say which machines are missing
_MAX_BYTES = 1 << 20
# A machine that loses power does not close its connection: the kernel probes it after 30 s of silence, three times.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))

OnFailure = Callable[[int, str], None]
OnMessage = Callable[["NodeInfo", Mapping[str, Any]], None]


class RendezvousError(RuntimeError):
    """Not all machines joined in time, and no wrong input is known."""


@dataclass(frozen=True)
class NodeInfo:
    """A machine of the job, as it introduces itself to machine 0."""

    node_rank: int
    num_nodes: int
    num_ranks: int
    host: str

    def __str__(self) -> str:
        return f"machine {self.node_rank} ({self.host})"


class JsonSocket:
    """A connection that carries JSON objects."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._buffer = connection, b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, message: Mapping[str, Any]) -> None:
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None) -> dict[str, Any] | None:
        """Return the next object, or None if the other side closed the connection.

        Raises:
            OSError: no object arrived in time, or the data is not JSON.
        """
        self._connection.settimeout(timeout)
        while b"\n" not in self._buffer:
            chunk = self._connection.recv(65536)
            if not chunk:
                return None
            self._buffer += chunk
            if len(self._buffer) > _MAX_BYTES:
                raise OSError("another program answers there")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            raise OSError("another program answers there") from None
        if not isinstance(message, dict):
            raise OSError("another program answers there")
        return message

    def can_send(self) -> bool:
        """Return True if a message can be sent without a wait for the other side."""
        return bool(select.select([], [self._connection], [], 0)[1])

    def is_open(self) -> bool:
        """Return False if the other side closed the connection."""
        self._connection.setblocking(False)
        try:
            return self._connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Rendezvous:
    """The connections between the machines of a job, after all have joined.

    Machine 0 has a connection to each other machine; each other machine has one to machine 0.
    """

    def __init__(self, connections: Mapping[NodeInfo, JsonSocket]) -> None:
        self._connections = dict(connections)
        self._lock = threading.Lock()
        self._is_finished = False

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._broadcast_final({"done": True})
        for connection in self._connections.values():
            connection.close()

    @property
    def machines(self) -> list[NodeInfo]:
        """The machines to which this machine has a connection."""
        return list(self._connections)

    def watch(self, on_failure: OnFailure, on_message: OnMessage = lambda *_: None) -> None:
        """Receive from all machines in other threads.

        Args:
            on_failure: called with exit code and text when another machine fails or its connection closes.
            on_message: called with the machine and its message for every other message, the last one is `done`.
        """
        for machine in self._connections:
            threading.Thread(target=self._watch_machine, args=(machine, on_failure, on_message), daemon=True).start()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message to all machines to which this machine has a connection. Does nothing after the last message.

        A machine that does not read, because its launcher is stopped, is skipped as soon as its buffers are full.
        """
        with self._lock:
            for connection in () if self._is_finished else self._connections.values():
                with suppress(OSError):  # `watch` reports a machine that is gone
                    if connection.can_send():
                        connection.send(message)

    def report_failure(self, code: int, text: str) -> None:
        """Send this machine's failure to all others. Does nothing after the first failure of the job."""
        self._broadcast_final({"failed": code, "text": text})

    def _broadcast_final(self, message: Mapping[str, Any], source: NodeInfo | None = None) -> bool:
        """Send this machine's last message to all but `source`. Return False if it was sent before."""
        with self._lock:
            if self._is_finished:
                return False
            self._is_finished = True
            for machine, connection in self._connections.items():
                if machine != source:
                    with suppress(OSError):  # a machine that is gone needs no message
                        connection.send(message)
            return True

    def _watch_machine(self, machine: NodeInfo, on_failure: OnFailure, on_message: OnMessage) -> None:
        while True:
            try:
                message = self._connections[machine].receive(None)
            except OSError:
                message = None
            if message is None or "failed" in message:
                break
            on_message(machine, message)
            if "done" in message:
                return
        message = message or {"failed": 1, "text": f"launch: {machine} is gone: its connection closed unexpectedly\n"}
        if self._broadcast_final(message, source=machine):
            on_failure(int(message["failed"]), str(message["text"]))


def rendezvous(me: NodeInfo, address: str, port: int, limit_seconds: float) -> Rendezvous:
    """Wait until all machines of the job have joined.

    Args:
        me: this machine.
        address: MASTER_ADDR.
        port: MASTER_PORT.
        limit_seconds: limit of the wait.

    Raises:
        UserError: MASTER_ADDR is not the address of machine 0, or the machines' settings contradict each other.
        RendezvousError: some machines did not join in time.
    """
    deadline = time.monotonic() + limit_seconds
    if me.node_rank == 0:
        return _accept_all(me, address, port, deadline, limit_seconds)
    return _connect_to_first(me, address, port, deadline, limit_seconds)


def _accept_all(me: NodeInfo, address: str, port: int, deadline: float, limit: float) -> Rendezvous:
    """Accept all other machines, on machine 0; then tell each that all have joined."""
    joined: dict[NodeInfo, JsonSocket] = {}
    reminder = _Reminder()
    with _open_server(port) as server:
        try:
            while len(joined) < me.num_nodes - 1:
                missing = sorted(set(range(1, me.num_nodes)) - {machine.node_rank for machine in joined})
                if time.monotonic() >= deadline:
                    raise RendezvousError(
                        f"NODE_RANK {', '.join(map(str, missing))} of {me.num_nodes} machines did not connect to "
                        f"MASTER_ADDR={address}, port {port} ({me.host}) within {limit:g} s; start them with the same "
                        "MASTER_ADDR and MASTER_PORT, and check that the port is open"
                    )
                reminder.print(f"waiting on port {port} for NODE_RANK {', '.join(map(str, missing))}")
                _accept_pending(me, server, joined)
        except (UserError, RendezvousError) as error:
            for connection in joined.values():
                with suppress(OSError):
                    connection.send({"rejected": str(error), "input": isinstance(error, UserError)})
                connection.close()
            raise
    meeting = Rendezvous(joined)
    for connection in joined.values():
        with suppress(OSError):  # the thread that watches this connection reports it
            connection.send({"go": True})
    return meeting


def _open_server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _accept_pending(me: NodeInfo, server: socket.socket, joined: dict[NodeInfo, JsonSocket]) -> None:
    """Accept one pending connection, if any, and add its machine to `joined`.

    Raises:
        UserError: the machine's settings contradict those of the others.
    """
    server.settimeout(_RETRY_SECONDS)
    try:
        accepted, _ = server.accept()
        connection = JsonSocket(accepted)
        message = connection.receive(_ANSWER_SECONDS)
        other = NodeInfo(**message) if message is not None else None
    except (OSError, TypeError):  # no connection, or a port scanner
        return
    if other is None:
        return
    for known in [m for m in joined if m.node_rank == other.node_rank and not joined[m].is_open()]:
        del joined[known]  # this machine was started again
    conflict = _find_conflict(me, other, joined)
    joined[other] = connection
    if conflict is not None:
        raise conflict
    connection.send({"welcome": me.host})


def _find_conflict(me: NodeInfo, other: NodeInfo, joined: Mapping[NodeInfo, JsonSocket]) -> UserError | None:
    """Return the error if the settings of `other` contradict those of the machines that have joined."""
    if other.num_nodes != me.num_nodes:
        return UserError(
            f"NNODES={me.num_nodes} on {me}, but NNODES={other.num_nodes} on {other}", remedy="set the same on all"
        )
    twins = [m for m in (me, *joined) if m.node_rank == other.node_rank]
    if twins:
        return UserError(
            f"NODE_RANK={other.node_rank} on {twins[0].host} and on {other.host}", remedy="number the machines from 0"
        )
    if other.num_ranks != me.num_ranks:
        return UserError(
            f"{me} has {me.num_ranks} ranks and {other} has {other.num_ranks}: every machine must have the same number",
            remedy="use machines with the same number of GPUs, or set run.world_size to what all can hold",
        )
    return None


def _connect_to_first(me: NodeInfo, address: str, port: int, deadline: float, limit: float) -> Rendezvous:
    """Connect to machine 0, on every other machine, and wait until all have joined."""
    reminder = _Reminder()
    while True:
        try:
            connection = JsonSocket(socket.create_connection((address, port), timeout=_ANSWER_SECONDS))
            connection.send(asdict(me))
            host = _read_welcome(connection)
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            return _wait_for_all(me, connection, host, deadline, limit)
        if time.monotonic() >= deadline:
            raise UserError(
                f"MASTER_ADDR={address}, port {port}: machine 0 was not reached within {limit:g} s ({reason})",
                remedy="set MASTER_ADDR to the address of the machine with NODE_RANK=0, start that machine, and check "
                "that its port is open",
            )
        reminder.print(f"MASTER_ADDR={address}, port {port}: {reason}; trying again")
        time.sleep(min(_RETRY_SECONDS, max(0.0, deadline - time.monotonic())))


def _read_welcome(connection: JsonSocket) -> str:
    """Return the host name of machine 0.

    Raises:
        UserError: machine 0 rejected this machine.
        OSError: machine 0 does not answer yet.
    """
    answer = connection.receive(_ANSWER_SECONDS)
    if answer is None:
        raise OSError("the connection was closed")
    if "rejected" in answer:
        raise UserError(str(answer["rejected"]))
    if "welcome" not in answer:
        raise OSError("another program answers there")
    return str(answer["welcome"])


def _wait_for_all(me: NodeInfo, connection: JsonSocket, host: str, deadline: float, limit: float) -> Rendezvous:
    """Wait until machine 0 reports that all machines have joined."""
    try:
        answer = connection.receive(max(_ANSWER_SECONDS, deadline - time.monotonic() + _ANSWER_SECONDS))
    except OSError:
        answer = {"rejected": f"not all of {me.num_nodes} machines joined within {limit:g} s; start them all"}
    if answer is None:
        raise RendezvousError(f"machine 0 ({host}) exited before all machines had joined; see its own output")
    if "rejected" in answer:
        raise (UserError if answer.get("input") else RendezvousError)(str(answer["rejected"]))
    return Rendezvous({NodeInfo(0, me.num_nodes, me.num_ranks, host): connection})


class _Reminder:
    """Prints a line at most every 30 s while this machine waits."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def print(self, text: str) -> None:
        if time.monotonic() - self._last >= _REMIND_SECONDS:
            self._last = time.monotonic()
            sys.stderr.write(f"launch: {text}\n")
            sys.stderr.flush()

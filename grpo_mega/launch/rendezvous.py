"""Where the agents of a job's machines meet before they start their ranks, and hear of each other's failures after.

Machine 0 listens on MASTER_PORT; the others try to reach it until the limit, so the order in which machines start does
not matter. What would hang or fail minutes later is refused here, with its reason: a wrong MASTER_ADDR, a NODE_RANK
given twice, machines with different numbers of ranks. The listening socket is closed when all have come (the ranks use
the port then); the connections stay: the first failure of any machine, its last lines and its exit code reach all.
Messages are JSON objects, one a line. Imports no torch. Tests: tests/unit/launch/test_rendezvous.py.
"""

from __future__ import annotations

import json
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

_ANSWER_SECONDS = 5.0  # for a connection and for the first word on it
_RETRY_SECONDS = 1.0
_REMIND_SECONDS = 30.0  # between two lines that say what is waited for
_MAX_BYTES = 1 << 20
# A machine that loses power says no goodbye: the kernel asks after 30 s of silence, and three times more.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))

OnFailure = Callable[[int, str], None]


class RendezvousError(RuntimeError):
    """Not all machines came, and nothing says that the user's input is wrong."""


@dataclass(frozen=True)
class NodeInfo:
    """One of the job's, as it introduces itself."""

    node_rank: int
    num_nodes: int
    num_ranks: int
    host: str

    def __str__(self) -> str:
        return f"machine {self.node_rank} ({self.host})"


class JsonSocket:
    """JSON objects over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._rest = connection, b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, message: Mapping[str, Any]) -> None:
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None) -> dict[str, Any] | None:
        """The next object; None: the other side has closed.

        Raises:
            OSError: nothing came in time, or the other side speaks another language.
        """
        self._connection.settimeout(timeout)
        while b"\n" not in self._rest:
            chunk = self._connection.recv(65536)
            if not chunk:
                return None
            self._rest += chunk
            if len(self._rest) > _MAX_BYTES:
                raise OSError("another program answers there")
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            raise OSError("another program answers there") from None
        if not isinstance(message, dict):
            raise OSError("another program answers there")
        return message

    def is_open(self) -> bool:
        """False when the other side has gone."""
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
    """All machines are there. Machine 0 holds a connection to each of the others, the others one to machine 0."""

    def __init__(self, lines: Mapping[NodeInfo, JsonSocket]) -> None:
        self._lines = dict(lines)
        self._lock = threading.Lock()
        self._over = False

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._spread({"done": True})
        for line in self._lines.values():
            line.close()

    def watch(self, on_failure: OnFailure) -> None:
        """Calls `on_failure(exit code, text)` in another thread when another machine has failed or is gone."""
        for machine in self._lines:
            threading.Thread(target=self._listen, args=(machine, on_failure), daemon=True).start()

    def tell(self, code: int, text: str) -> None:
        """This machine has failed; only the first failure of a job is passed on."""
        self._spread({"failed": code, "text": text})

    def _spread(self, message: Mapping[str, Any], source: NodeInfo | None = None) -> bool:
        """To all but `source`; False when this machine has said its last word already."""
        with self._lock:
            if self._over:
                return False
            self._over = True
            for machine, line in self._lines.items():
                if machine != source:
                    with suppress(OSError):  # whoever is gone needs no word
                        line.send(message)
            return True

    def _listen(self, machine: NodeInfo, on_failure: OnFailure) -> None:
        try:
            message = self._lines[machine].receive(None)
        except OSError:
            message = None
        if message is not None and "done" in message:
            return
        message = message or {"failed": 1, "text": f"launch: {machine} is gone: its connection ended without a word\n"}
        if self._spread(message, source=machine):
            on_failure(int(message["failed"]), str(message["text"]))


def rendezvous(me: NodeInfo, address: str, port: int, limit_seconds: float) -> Rendezvous:
    """Waits for the others.

    Args:
        me: this machine.
        address: MASTER_ADDR.
        port: MASTER_PORT.
        limit_seconds: the longest wait.

    Raises:
        UserError: MASTER_ADDR does not lead to machine 0, or the machines do not go together.
        RendezvousError: some did not come in time.
    """
    deadline = time.monotonic() + limit_seconds
    if me.node_rank == 0:
        return _host(me, address, port, deadline, limit_seconds)
    return _join(me, address, port, deadline, limit_seconds)


def _host(me: NodeInfo, address: str, port: int, deadline: float, limit: float) -> Rendezvous:
    arrived: dict[NodeInfo, JsonSocket] = {}
    reminder = _Reminder()
    with _server(port) as server:
        try:
            while len(arrived) < me.num_nodes - 1:
                missing = sorted(set(range(1, me.num_nodes)) - {machine.node_rank for machine in arrived})
                if time.monotonic() >= deadline:
                    raise RendezvousError(
                        f"NODE_RANK {', '.join(map(str, missing))} of {me.num_nodes} machines did not come to "
                        f"MASTER_ADDR={address}, port {port} ({me.host}) within {limit:g} s; start them with the same "
                        "MASTER_ADDR and MASTER_PORT, and see that the port is open"
                    )
                reminder.say(f"waiting on port {port} for NODE_RANK {', '.join(map(str, missing))}")
                _receive(me, server, arrived)
        except (UserError, RendezvousError) as error:
            for line in arrived.values():
                with suppress(OSError):
                    line.send({"refused": str(error), "input": isinstance(error, UserError)})
                line.close()
            raise
    meeting = Rendezvous(arrived)
    for line in arrived.values():
        with suppress(OSError):  # noticed by the thread that listens to it
            line.send({"go": True})
    return meeting


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _receive(me: NodeInfo, server: socket.socket, arrived: dict[NodeInfo, JsonSocket]) -> None:
    """One machine, if there is one at the door."""
    server.settimeout(_RETRY_SECONDS)
    try:
        connection, _ = server.accept()
        line = JsonSocket(connection)
        message = line.receive(_ANSWER_SECONDS)
        other = NodeInfo(**message) if message is not None else None
    except (OSError, TypeError):  # nobody, or a port scanner
        return
    if other is None:
        return
    for known in [m for m in arrived if m.node_rank == other.node_rank and not arrived[m].is_open()]:
        del arrived[known]  # it was started again
    problem = _problem(me, other, arrived)
    arrived[other] = line
    if problem:
        raise UserError(problem)
    line.send({"welcome": me.host})


def _problem(me: NodeInfo, other: NodeInfo, arrived: Mapping[NodeInfo, JsonSocket]) -> str:
    if other.num_nodes != me.num_nodes:
        return f"NNODES={me.num_nodes} on {me}, but NNODES={other.num_nodes} on {other}; set the same on all"
    twins = [m for m in (me, *arrived) if m.node_rank == other.node_rank]
    if twins:
        return f"NODE_RANK={other.node_rank} on {twins[0].host} and on {other.host}; number the machines from 0"
    if other.num_ranks != me.num_ranks:
        return (
            f"{me} has {me.num_ranks} ranks and {other} has {other.num_ranks}: layouts need the same number on every "
            "machine; use machines with as many GPUs, or set run.world_size to what all can hold"
        )
    return ""


def _join(me: NodeInfo, address: str, port: int, deadline: float, limit: float) -> Rendezvous:
    reminder = _Reminder()
    while True:
        try:
            line = JsonSocket(socket.create_connection((address, port), timeout=_ANSWER_SECONDS))
            line.send(asdict(me))
            host = _welcome(line)
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            return _wait_for_all(me, line, host, deadline, limit)
        if time.monotonic() >= deadline:
            raise UserError(
                f"MASTER_ADDR={address}, port {port}: machine 0 was not reached within {limit:g} s ({reason})",
                remedy="set "
                "MASTER_ADDR to the address of the machine with NODE_RANK=0, start that one, and see that its port is "
                "open",
            )
        reminder.say(f"MASTER_ADDR={address}, port {port}: {reason}; trying again")
        time.sleep(min(_RETRY_SECONDS, max(0.0, deadline - time.monotonic())))


def _welcome(line: JsonSocket) -> str:
    answer = line.receive(_ANSWER_SECONDS)
    if answer is None:
        raise OSError("the connection was closed")
    if "refused" in answer:
        raise UserError(str(answer["refused"]))
    if "welcome" not in answer:
        raise OSError("another program answers there")
    return str(answer["welcome"])


def _wait_for_all(me: NodeInfo, line: JsonSocket, host: str, deadline: float, limit: float) -> Rendezvous:
    try:
        answer = line.receive(max(_ANSWER_SECONDS, deadline - time.monotonic() + _ANSWER_SECONDS))
    except OSError:
        answer = {"refused": f"not all of {me.num_nodes} machines came within {limit:g} s; start them all"}
    if answer is None:
        raise RendezvousError(f"machine 0 ({host}) has ended before all machines had come; its own screen says why")
    if "refused" in answer:
        raise (UserError if answer.get("input") else RendezvousError)(str(answer["refused"]))
    return Rendezvous({NodeInfo(0, me.num_nodes, me.num_ranks, host): line})


class _Reminder:
    """Says what is waited for, now and then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        if time.monotonic() - self._last >= _REMIND_SECONDS:
            self._last = time.monotonic()
            sys.stderr.write(f"launch: {text}\n")
            sys.stderr.flush()

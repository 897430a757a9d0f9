"""The server's end: listens, lets in who knows the secret, and serves one job at a time.

Whoever connects is greeted in a thread of its own; the commands of the job that is served are read by the thread that
carries them out. A job that ends, dies or is cut off frees the server.
Asserted by tests/parallel/test_servers.py.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from grpo_mega.engines.server.protocol import Connection, ConnectionFailedError, ServerMessage

log = logging.getLogger("grpo_mega.engines")

FREED = "freed"
"""Kind of the message that stands for the end of a job."""
_GREETING_SECONDS = 10.0
_MOST_GUESTS = 32  # who are greeted at the same time
_BEAT_SECONDS = 1.0


class ServerListener:
    """On the first rank of a server."""

    def __init__(self, listener: socket.socket, token: bytes, facts: Mapping[str, Any], timeout_seconds: float) -> None:
        """Lets nobody in before `open`.

        Args:
            listener: bound to the server's address.
            token: the secret; empty: none.
            facts: what a job must have in common with this server (serving.py).
            timeout_seconds: of a message to or from the job.
        """
        self._listener, self._token, self._facts, self._timeout = listener, token, facts, timeout_seconds
        self._state = threading.Condition()
        self._job: Connection | None = None
        self._who = ""
        self._gone = False  # the job is, and the server has not yet come to the end of what it asked for
        self._guests = threading.Semaphore(_MOST_GUESTS)

    def open(self) -> None:
        """From now on."""
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def commands(self, beat_seconds: float) -> Iterator[ServerMessage | None]:
        """What jobs ask for, one job after the other without end; `FREED` behind each job, and None at least every
        `beat_seconds`."""
        while True:
            with self._state:
                if self._job is None:
                    self._state.wait(beat_seconds)
                job = self._job
            if job is None:
                yield None
                continue
            try:
                self.check_job()
                if not job.waits(beat_seconds):
                    yield None
                    continue
                message = job.receive()
            except ConnectionFailedError as error:
                message = ServerMessage("end", {"why": str(error)})
            if message.kind == "end":
                log.info("free: the job of %s %s", self._who, message.fields.get("why", "has ended"))
                job.close()
                yield ServerMessage(FREED)
                with self._state:
                    self._job, self._gone = None, False
            else:
                yield message

    def answer(self, kind: str, fields: Mapping[str, Any] | None = None, blobs: Sequence[bytes] = ()) -> None:
        """To the job; if it is gone, to nobody."""
        if self._job is None or self._gone:
            return
        try:
            self._job.send(kind, fields, blobs)
        except ConnectionFailedError as error:
            log.warning("the job of %s %s", self._who, error)
            self._gone = True

    def check_job(self) -> None:
        """Raises ConnectionFailedError if the job is known to be gone."""
        if self._gone:
            raise ConnectionFailedError("is gone")

    @contextmanager
    def beating(self, steps: Callable[[], int]) -> Iterator[None]:
        """Inside, the job hears every second how many engine steps have been made."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(_BEAT_SECONDS):
                self.answer("beat", {"steps": steps()})

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError as error:  # a caller that is gone already, or no descriptors left
                log.warning("nobody could be let in: %s", error)
                time.sleep(_BEAT_SECONDS)
                continue
            if self._guests.acquire(blocking=False):
                threading.Thread(target=self._receive, args=(connection, str(address[0])), daemon=True).start()
            else:
                connection.close()

    def _receive(self, connection: socket.socket, peer: str) -> None:
        stays = False
        try:
            wire = Connection(connection, "server", _GREETING_SECONDS)
            wire.handshake(self._token)
            wire.send("facts", {"facts": dict(self._facts), "serves": self._who if self._job is not None else None})
            stays = self._claimed(wire, wire.receive(), peer)
        except (ConnectionFailedError, OSError) as error:
            log.warning("who called from %s %s", peer, error)
        finally:
            self._guests.release()
            if not stays:
                connection.close()

    def _claimed(self, wire: Connection, wish: ServerMessage, peer: str) -> bool:
        if wish.kind != "claim":
            return False
        with self._state:
            if self._job is not None:
                wire.send("later" if self._gone else "busy", {"who": self._who})
                return False
            wire.set_timeout(self._timeout)
            wire.send("yours")
            self._job, self._who = wire, f"{wish.fields.get('who')} ({peer})"
            self._state.notify_all()
        log.info("serving the job of %s", self._who)
        return True

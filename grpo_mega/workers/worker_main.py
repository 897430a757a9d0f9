"""The child's side of one worker process (json_worker.py): `python -m MODULE DESCRIPTOR PARENT_PID`.

The process ends with its parent: when the connection closes, and on Linux by the parent-death signal. The time limit of
a job is in time_limit.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Any

_PR_SET_PDEATHSIG = 1
_worker_pid = os.getpid()

Handler = Callable[[Any], Iterable[object]]
"""Takes the message of one job and yields its answers."""


def serve(prepare: Callable[[Any], Handler]) -> None:
    """Answer jobs until the parent closes the connection.

    Args:
        prepare: called with the setup, returns the handler of jobs. An exception in it is sent to the parent.
    """
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    _exit_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)  # programs that a job starts do not get it
    connection.setblocking(True)
    try:
        with connection.makefile("rb") as lines:  # the exit of the process closes the connection
            setup = json.loads(lines.readline() or b"null")
            if setup is None:
                return
            try:
                handle = prepare(setup)
            except Exception as error:  # the import of a user's module may raise anything
                _send(connection, {"error": f"{type(error).__name__}: {error}"})
                return
            _send(connection, {"ready": True})
            for line in lines:
                for answer in handle(json.loads(line)):
                    _send(connection, answer)
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the parent has exited
    except OSError as error:  # for example a reward that closed every descriptor of its process
        sys.exit(f"worker {_worker_pid}: the code that it runs has closed its connection ({error.strerror})")


def _exit_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent has exited, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent exited before the line above
        sys.exit(1)


def _send(connection: socket.socket, message: object) -> None:
    """Send one line. A process that the job forked exits here: its answer would be taken for that of another job."""
    if os.getpid() != _worker_pid:
        os._exit(0)
    connection.sendall(json.dumps(message).encode("ascii") + b"\n")

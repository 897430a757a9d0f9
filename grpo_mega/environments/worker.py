"""The child's side of an environment process. `python -m grpo_mega.environments.worker DESCRIPTOR PARENT`.

Reads a job per line, answers a line per job. A job that outlasts its limit is ended by the process's own alarm, which
kills the process: no environment can hold it back.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

from grpo_mega.environments.base import Turn, build_environment
from grpo_mega.workers.process import die_with


@dataclass(frozen=True)
class WorkerSpec:
    """The config's section as it comes over the wire; its own class is not imported here."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Serve jobs until the parent closes the socket."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as lines:
        connection.setblocking(True)
        setup = json.loads(lines.readline() or b"null")
        if setup is None:
            return
        respond = build_environment(WorkerSpec(setup["name"], setup["args"]))
        connection.sendall(b"{}\n")
        for line in lines:
            prompt, turns, reference = json.loads(line)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # each time: an environment may have put its own there
            signal.setitimer(signal.ITIMER_REAL, setup["timeout_seconds"])
            try:
                reply = {"result": respond(prompt, [Turn(*turn) for turn in turns], reference)}
            except (Exception, SystemExit) as error:  # whatever it raises is a failed turn, never a dead worker
                reply = {"failure": f"raised {type(error).__name__}: {error}"[:500]}
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            connection.sendall(json.dumps(reply).encode("ascii") + b"\n")


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the parent is gone

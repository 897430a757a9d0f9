"""The child's side of a reward process: `python -m grpo_mega.rewards.worker FD PARENT_PID`.

Reads JSON lines from the socket FD: first the setup, then one job per line. Writes one line per component as soon as it
is known, so that the parent can tell which scoring a dying worker was at. The kernel's own alarm ends a scoring that
takes too long: it needs neither the interpreter (a catastrophic regular expression never lets go of it) nor the
parent. The process ends with its parent: at the end of the socket, and on Linux by the parent-death signal.

Setup `{"terms": [[name, weight, args] or null, ...], "timeout_seconds": s}`, null for what is scored elsewhere ->
`{"ready": true}` or `{"error": "..."}`.
Job `[serial, positions of terms, prompt, completion, reference]` -> for each of the positions a line
`[serial, position, value or null, problem or null, seconds]`.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from grpo_mega.rewards.base import RewardComponent, Value, build_rewards
from grpo_mega.workers.process import die_with


@dataclass(frozen=True)
class WorkerTerm:
    """A term as it comes over the wire; the config's class is not imported here."""

    name: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Serve jobs until the parent closes the socket."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    connection = socket.socket(fileno=descriptor)
    connection.setblocking(True)
    with connection, connection.makefile("rb") as lines:
        setup = json.loads(lines.readline() or b"null")
        if setup is None:
            return
        try:
            positions = [position for position, term in enumerate(setup["terms"]) if term is not None]
            built = build_rewards([WorkerTerm(*setup["terms"][position]) for position in positions])
            components = dict(zip(positions, built, strict=True))
        except Exception as error:  # whatever the import of a user's module raises is reported, not lost
            _send(connection, {"error": f"{type(error).__name__}: {error}"})
            return
        _send(connection, {"ready": True})
        for line in lines:
            serial, positions, prompt, completion, reference = json.loads(line)
            for position in positions:
                answer = _score(components[position], prompt, completion, reference, setup["timeout_seconds"])
                _send(connection, [serial, position, *answer])


def _score(
    component: RewardComponent, prompt: str, completion: str, reference: str, timeout_seconds: float
) -> tuple[Value | None, str | None, float]:
    started = time.monotonic()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # each time: a reward may have put its own handler there
    signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
    value: Value | None = None
    problem = None
    try:
        value = component(prompt, completion, reference)
    except (Exception, SystemExit) as error:  # anything that a reward raises is a failed scoring, never a dead worker
        problem = f"{type(error).__name__}: {error}"[:500]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return value, problem, time.monotonic() - started


def _send(connection: socket.socket, message: object) -> None:
    connection.sendall(json.dumps(message).encode("ascii") + b"\n")


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the parent is gone

"""Protocol of tools/bench_step.py and its two child processes: JSON lines, command and answer. Also their stopwatch.

Standard library only, because the two sides run in different environments.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any


class Channel:
    """Channel of the child process. It redirects stdout to stderr, so that library output is not mixed with answers."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def receive(self) -> dict[str, Any] | None:
        """Return the next command; None if the parent has closed the stream."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def send(self, answer: dict[str, Any]) -> None:
        """Send an answer with the peak of resident memory so far."""
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._answers.write(json.dumps(answer | {"peak_bytes": peak_bytes}) + "\n")
        self._answers.flush()


class Stopwatch:
    """Wall and CPU seconds of this process since the stopwatch was created."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return the seconds with the keys of an answer."""
        return {"seconds": time.perf_counter() - self._wall, "cpu_seconds": time.process_time() - self._cpu}

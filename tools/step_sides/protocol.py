"""How tools/bench_step.py talks with its two child processes: one JSON object per line, both ways, in turn; and how
both of them count seconds.

Standard library only: the two sides live in different environments.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any


class Channel:
    """The child's end. What libraries print goes to stderr from here on, so that it never meets the answers."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def receive(self) -> dict[str, Any] | None:
        """The next command; None when the parent has closed its end."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def send(self, answer: dict[str, Any]) -> None:
        """Adds the peak of resident memory so far."""
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._answers.write(json.dumps(answer | {"peak_bytes": peak_bytes}) + "\n")
        self._answers.flush()


class Stopwatch:
    """Wall and CPU seconds of this process since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """As an answer carries them."""
        return {"seconds": time.perf_counter() - self._wall, "cpu_seconds": time.process_time() - self._cpu}

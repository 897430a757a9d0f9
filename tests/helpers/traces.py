"""Checks the form of a merged trace."""

from __future__ import annotations

import gzip
import json
from itertools import groupby
from pathlib import Path
from typing import Any

_ROUNDING = 1e-3  # microseconds


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the events of a merged trace."""
    events: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return events


def check_trace(path: Path, *, num_ranks: int) -> list[dict[str, Any]]:
    """Check ranks, times, and that the spans of each thread are nested; return the events."""
    events = read_trace(path)
    assert {event["pid"] for event in events} == set(range(num_ranks))
    for rank in range(num_ranks):
        assert any(e["name"] == "process_name" and e["pid"] == rank for e in events)
    timed = [event for event in events if event["ph"] != "M"]
    assert min(event["ts"] for event in timed) == 0
    spans = [event for event in timed if event["ph"] == "X"]
    assert all(event["dur"] >= 0 for event in spans)
    threads = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}

    def thread_of(event: dict[str, Any]) -> tuple[int, int]:
        return event["pid"], event["tid"]

    for thread, own in groupby(sorted(spans, key=thread_of), key=thread_of):
        assert thread in threads
        open_ends: list[float] = []
        for event in sorted(own, key=lambda e: (e["ts"], -e["dur"])):
            while open_ends and open_ends[-1] <= event["ts"] + _ROUNDING:
                open_ends.pop()
            end = event["ts"] + event["dur"]
            assert not open_ends or end <= open_ends[-1] + _ROUNDING, f"{event} is not nested"
            open_ends.append(end)
    return events

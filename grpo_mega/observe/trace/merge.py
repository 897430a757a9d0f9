"""Merges the traces of all ranks into one file in Chrome's trace format, which ui.perfetto.dev opens.

A rank is a process of the trace. All times are on the clock of the first rank, in microseconds from the first event.
Asserted by tests/unit/observe/test_trace.py and tests/e2e/test_trace.py.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mega.types import UserError

RANK_FILES = "rank-*.jsonl"


@dataclass(frozen=True)
class MergedTrace:
    """Result of a merge.

    Attributes:
        path: the merged file.
        num_ranks: ranks with a file.
        num_events: spans and points of curves.
        num_skipped: lines that could not be read, at most one per command of the run if it was killed.
        uncertainty_ns: largest error of a clock.
    """

    path: Path
    num_ranks: int
    num_events: int
    num_skipped: int
    uncertainty_ns: int


def merge_trace(folder: Path, out: Path) -> MergedTrace:
    """Write the events of the rank files in `folder` to `out`, a gzip file.

    Raises:
        UserError: there is no rank file, or `out` cannot be written.
    """
    files = sorted(folder.glob(RANK_FILES))
    if not files:
        raise UserError(f"{folder} has no trace", remedy="start the run with observe.trace=true")
    first = min((start for path in files for start in _starts(path)), default=0)
    num_events = num_skipped = uncertainty = 0
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        with gzip.open(temporary, "wt", encoding="ascii", compresslevel=5) as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [')
            separator = "\n"
            for path in files:
                rank = int(path.stem.partition("-")[2])
                for event in _read(path):
                    if event is None:
                        num_skipped += 1
                        continue
                    if event[0] == "clock":
                        uncertainty = max(uncertainty, event[3])
                    for found in _chrome_events(rank, event, first):
                        num_events += found["ph"] != "M"
                        file.write(f"{separator}{json.dumps(found)}")
                        separator = ",\n"
            file.write("\n]}\n")
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror})", remedy="free space, or name a file") from error
    return MergedTrace(out, len(files), num_events, num_skipped, uncertainty)


def _read(path: Path) -> Iterator[list[Any] | None]:
    """Yield the events of a rank file, with times in nanoseconds since 1970; None for a line that is not one."""
    offset: int | None = None
    with path.open("rb") as file:
        for line in file:
            if line == b"\n":
                continue
            event = _event(line)
            if event is None:
                yield None
            elif event[0] == "clock":
                offset = event[2]
                yield event
            elif event[0] == "thread":
                yield event
            elif offset is None:
                yield None
            else:
                at = 4 if event[0] == "span" else 2
                event[at] += offset
                yield event


_FORMS: dict[str, tuple[type | tuple[type, ...], ...]] = {
    "clock": (str, int, int),
    "thread": (int, str),
    "span": (int, str, str, int, int, dict),
    "counter": (str, int, (int, float)),
}


def _event(line: bytes) -> list[Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    if not isinstance(found, list) or not found or not isinstance(found[0], str) or found[0] not in _FORMS:
        return None
    form = _FORMS[found[0]]
    is_right = len(found) == len(form) + 1 and all(map(isinstance, found[1:], form))
    return found if is_right else None


def _starts(path: Path) -> Iterator[int]:
    for event in _read(path):
        if event is not None and event[0] in ("span", "counter"):
            yield event[4] if event[0] == "span" else event[2]


def _chrome_events(rank: int, event: list[Any], first: int) -> list[dict[str, Any]]:
    """Return the events of the trace format for one line; `first` is subtracted from its times, in nanoseconds."""
    match event:
        case ["clock", str() as name, *_]:
            return [
                {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": name}},
                {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}},
            ]
        case ["thread", thread, str() as name]:
            return [{"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}}]
        case ["span", thread, name, category, start, length, args]:
            return [
                {
                    "ph": "X", "name": name, "cat": category, "pid": rank, "tid": thread,
                    "ts": (start - first) / 1000, "dur": length / 1000, "args": args,
                }
            ]  # fmt: skip
        case ["counter", name, at, value]:
            return [
                {"ph": "C", "name": name, "pid": rank, "tid": 0, "ts": (at - first) / 1000, "args": {"value": value}}
            ]
    raise AssertionError(f"{event[0]} is not an event of a rank file")

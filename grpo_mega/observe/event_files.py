"""Cuts TensorBoard event files at the step from which a run continues.

An event file is a sequence of records: 8 bytes length, 4 bytes CRC of the length, the event, 4 bytes CRC of the event.
Records are copied with their CRCs. An incomplete record at the end, of a killed process, is removed.
Asserted by tests/unit/observe/test_event_files.py.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from grpo_mega.observe.atomic_files import TEMPORARY_SUFFIX

_HEADER, _FOOTER_BYTES = struct.Struct("<Q4s"), 4


def cut_event_files(directory: Path, first_step: int) -> dict[str, int]:
    """Remove every event of step `first_step` or later, so that no curve has two points of a step.

    TensorBoard has such a rule of its own (`purge_step`), but its fast loader does not apply it to a curve that the
    continued run does not write again.

    Args:
        directory: folder with `*.tfevents.*` files, which need not exist.
        first_step: first step that the continued run writes.

    Returns:
        {name of a curve or text: its last step that stays}, of the files that were read. Files that are older than a
        file without such events were cut at an earlier start, and are not read.
    """
    last: dict[str, int] = {}
    for path in sorted(directory.glob("*.tfevents.*"), reverse=True):
        if path.name.endswith(TEMPORARY_SUFFIX):
            path.unlink()
            continue
        num_dropped, num_kept = _cut_file(path, first_step, last)
        if num_kept and not num_dropped:
            break
    return last


def _cut_file(path: Path, first_step: int, last: dict[str, int]) -> tuple[int, int]:
    """Cut one file and add its steps to `last`; return the numbers of dropped and kept events that have values."""
    num_dropped = num_kept = 0
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with temporary.open("wb") as cut:
        for record, tags, step in _records(path):
            if tags and step >= first_step:
                num_dropped += 1
                continue
            cut.write(record)
            num_kept += bool(tags)
            for tag in tags:
                last[tag] = max(step, last.get(tag, step))
        cut.flush()
        os.fsync(cut.fileno())
        is_equal = cut.tell() == path.stat().st_size
    if is_equal:
        temporary.unlink()
    else:
        temporary.replace(path)
    return num_dropped, num_kept


def _records(path: Path) -> Iterator[tuple[bytes, list[str], int]]:
    """Yield each complete record with the names of the values in its event, and the event's step."""
    from tensorboard.compat.proto.event_pb2 import Event

    remaining = path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            (length, _) = _HEADER.unpack(header)
            remaining -= _HEADER.size + length + _FOOTER_BYTES
            if remaining < 0:
                return
            body = file.read(length + _FOOTER_BYTES)
            event = Event.FromString(body[:length])
            yield header + body, [value.tag for value in event.summary.value], event.step

"""Reads the flight recorder of NCCL for the report of a stall: the last collective of each rank.

torch records the collectives of each rank in a ring buffer. A C++ thread of torch, which does not need Python's global
lock, writes the buffer to a file when a byte arrives in a named pipe, or when a collective times out. Environment
variables of the ranks name the file and the pipe (torch 2.13, ProcessGroupNCCL.hpp: `DumpPipe`; FlightRecorder.hpp).
The file is a pickle of plain values; a pickle that names any class is not read. Without NCCL there is no pipe and no
file.
Imports no torch. Asserted by tests/unit/launch/test_flight_records.py. Not yet run with NCCL.
"""

from __future__ import annotations

import io
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_DUMP, _PIPE = "nccl_trace_rank_", "nccl_pipe_rank_"
_ENTRIES = "2000"  # torch's own default; a user may have set another one, or 0
_WAIT_SECONDS = 2.5
_MAX_BYTES = 256 << 20
_OLDER_NAMES = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
}


def flight_environment(folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that turn the flight recorder on, except for those that the user has set.

    Args:
        folder: temporary folder of the run on this machine.
        env: environment of the launcher.
    """
    wanted = {
        "TORCH_FR_BUFFER_SIZE": _ENTRIES,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder / _DUMP),
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(folder / _PIPE),
    }
    return {key: value for key, value in wanted.items() if key not in env and _OLDER_NAMES.get(key, key) not in env}


def request_dumps(folder: Path, ranks: Sequence[int]) -> list[int]:
    """Ask ranks of this machine to write their records; return the ranks that have a pipe. Does not wait."""
    asked = []
    for rank in ranks:
        with suppress(OSError):  # no pipe, or no reader any more
            descriptor = os.open(folder / f"{_PIPE}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(descriptor, b"1\n")
                asked.append(rank)
            finally:
                os.close(descriptor)
    return asked


def last_collectives(folder: Path, ranks: Sequence[int], asked: Sequence[int], since: float) -> dict[int, str]:
    """Return rank -> one line about its last collectives, for the ranks with a record.

    Args:
        folder: temporary folder of the run.
        ranks: ranks of this machine.
        asked: result of `request_dumps`. The function waits at most 2.5 s for the files of these ranks.
        since: `time.monotonic()` at the call of `request_dumps`.
    """
    while time.monotonic() - since < _WAIT_SECONDS and not all(_size(folder, rank) for rank in asked):
        time.sleep(0.05)
    if asked:
        time.sleep(0.1)  # for the rest of a file that is being written
    found = {}
    for rank in ranks:
        if 0 < _size(folder, rank) <= _MAX_BYTES:
            found[rank] = describe_dump((folder / f"{_DUMP}{rank}").read_bytes())
    return found


def describe_dump(data: bytes) -> str:
    """Return one line about the last collective of a record and the first collective that is not complete.

    If the record cannot be read, the line says so.
    """
    try:
        dump = _RecordUnpickler(io.BytesIO(data)).load()
        entries = sorted(dump["entries"], key=lambda each: int(each["record_id"]))
        if not entries:
            return "the flight recorder holds no collective"
        pending = [each for each in entries if each["state"] != "completed" and not each["retired"]]
        text = f"last collective in the flight recorder: {_describe(entries[-1])}"
        if pending and pending[0] is not entries[-1]:
            text += f"; first one that is not complete: {_describe(pending[0])}"
        return text
    except Exception as error:  # a damaged or foreign pickle raises anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return f"the record of the flight recorder cannot be read ({reason})"


def _describe(entry: Mapping[str, Any]) -> str:
    group, name = entry["process_group"]
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    state = "completed" if entry["retired"] or entry["state"] == "completed" else f"{entry['state']}, not completed"
    return (
        f"{entry['profiling_name']} number {number} of process group {group} ({name}), {state}, "
        f"input sizes {entry['input_sizes']}"
    )


class _RecordUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, tuples, numbers and texts only."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _size(folder: Path, rank: int) -> int:
    with suppress(OSError):
        return (folder / f"{_DUMP}{rank}").stat().st_size
    return 0

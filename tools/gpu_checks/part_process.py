"""Runs one part in a process of its own, and ends it together with every process that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_MARK = "GRPO_MEGA_GPU_CHECK"  # environment variable that all processes of a part inherit
_LAST_LINES = 20


@dataclass(frozen=True)
class ProcessEnd:
    """Outcome of a process: its seconds, and the reason if it failed (empty otherwise)."""

    seconds: float
    reason: str


def run_limited(
    command: Sequence[str], env: Mapping[str, str], folder: Path, log: Path, limit_seconds: float
) -> ProcessEnd:
    """Run a command until it ends or reaches the limit. No process that it started is left behind.

    Args:
        command: program and arguments.
        env: its environment.
        folder: its working folder.
        log: file for its standard output and error.
        limit_seconds: seconds after which it is killed.
    """
    mark = uuid.uuid4().hex
    begin, reason = time.monotonic(), ""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env={**env, _MARK: mark}, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit_seconds)
            if code < 0:
                reason = f"killed by signal {-code} ({signal.Signals(-code).name})"
            elif code:
                reason = f"exit code {code}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {limit_seconds:.0f} s"
        finally:
            _kill_marked(mark)
            process.wait()
    if reason:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LAST_LINES:]
        reason = "\n".join([reason, *lines])
    return ProcessEnd(time.monotonic() - begin, reason)


def _kill_marked(mark: str) -> None:
    """Kill every process whose environment holds the mark, also those that left the session of the part."""
    while marked := _marked_processes(mark):  # a process may have started another one meanwhile
        for process in marked:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)


def _marked_processes(mark: str) -> list[int]:
    entry = f"{_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # the process finished, or belongs to another user
            continue
        if entry in environment and state not in "ZX":
            found.append(int(folder.name))
    return found

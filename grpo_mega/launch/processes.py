"""Reads processes from /proc: the processes of a run, their state, and the shared memory that they hold. Linux only.

A process belongs to the run whose temporary folder is the value of TMPDIR in its first environment. Children inherit
the variable, so this also finds processes whose parents have exited. Imports no torch.
Asserted by tests/unit/launch/test_processes.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from grpo_mega.parallel.shared_memory import SHARED_MEMORY

_PROC = Path("/proc")
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


def own_processes() -> Iterator[int]:
    """Yield the ids of all processes of this user except this one."""
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(*_GONE):
                if entry.stat().st_uid == os.getuid():
                    yield int(entry.name)


def processes_of_run(folder: Path) -> list[int]:
    """Return the living processes whose TMPDIR is `folder`."""
    mark = b"\0TMPDIR=" + os.fsencode(folder) + b"\0"
    return [pid for pid in own_processes() if mark in b"\0" + _read(pid, "environ") and state(pid) not in "ZX"]


def state(pid: int) -> str:
    """Return the state letter of proc_pid_stat(5): R running, S sleeping, D disk sleep, T stopped, t traced, Z zombie.

    The state of a process that does not exist is X.
    """
    text = _read(pid, "stat").decode(errors="replace")
    return text.rpartition(")")[2].split()[0] if ")" in text else "X"


def children(pid: int) -> list[int]:
    """Return the ids of the children of a process."""
    found: list[int] = []
    with suppress(*_GONE):
        for thread in (_PROC / str(pid) / "task").iterdir():
            with suppress(*_GONE):
                found += map(int, (thread / "children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """Return the ids of the children of a process, of their children, and so on."""
    found = children(pid)
    return found + [each for child in found for each in descendants(child)]


def command_line(pid: int) -> str:
    """Return the command line of a process, or an empty string if it does not exist."""
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()


def catches(pid: int, number: int) -> bool:
    """Return True if the process has a handler for the signal. Without one the signal may end the process."""
    for line in _read(pid, "status").decode(errors="replace").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def file_bytes(pid: int) -> int:
    """Return the number of bytes that the process has read, also from sockets, and written to storage."""
    lines = _read(pid, "io").decode(errors="replace").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar:", "write_bytes:")))


def held_shared_memory(pid: int) -> set[str]:
    """Return the names of the files in /dev/shm that the process has mapped or opened."""
    prefix = f"{SHARED_MEMORY}/"
    found = set()
    for line in _read(pid, "maps").decode(errors="replace").splitlines():
        path = line.partition(prefix)[2]
        if path and not path.endswith(" (deleted)"):
            found.add(path)
    with suppress(*_GONE):
        for descriptor in (_PROC / str(pid) / "fd").iterdir():
            with suppress(*_GONE):
                target = os.readlink(descriptor)
                if target.startswith(prefix):
                    found.add(target.removeprefix(prefix))
    return found


def kill(pid: int) -> None:
    """Send SIGKILL, which also ends a stopped process. A process that has exited is ignored."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _read(pid: int, name: str) -> bytes:
    try:
        return (_PROC / str(pid) / name).read_bytes()
    except (*_GONE, OSError):
        return b""

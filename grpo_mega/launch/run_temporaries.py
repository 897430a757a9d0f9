"""The temporary folder of one run on one machine, and the removal of everything that the run leaves there.

The launcher makes `<TMPDIR>/grpo_mega_run_XXXXXXXX`, which is TMPDIR of all processes of the run: their temporary files
and Unix sockets are in it. Its file `shared_memory` lists the files of the run in /dev/shm. A separate process, the
cleaner (cleaner.py), maintains that list, waits for the end of the launcher, and removes what is left: processes,
shared memory, the folder. Launcher and cleaner lock the folder, and the kernel releases the lock when both have exited.
So a folder without a lock belongs to a run of which both were killed, and the next start removes it in the same way.

Invariant: no file that a living process of another run holds is removed. Imports no torch.
Asserted by tests/unit/launch/test_run_temporaries.py.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grpo_mega.launch.processes import held_shared_memory, kill, own_processes, processes_of_run
from grpo_mega.parallel.shared_memory import SHARED_MEMORY
from grpo_mega.types import UserError

PREFIX = "grpo_mega_run_"
_LOCK, _LIST, _HOST = "lock", "shared_memory", "host"
_OWN_END_SECONDS = 2.0  # in which processes of an ended run may end by themselves
_KILL_SECONDS = 5.0
_CLEANER_SECONDS = 12.0
_LOOKS = 5  # at a new file in /dev/shm, before it is taken for that of another program


class SharedMemoryList:
    """The list of the files in /dev/shm that processes of this run hold, kept in the run's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[str] = set()
        self._looks: dict[str, int] = {}

    def update(self) -> None:
        """Add the new files that processes of the run hold. Costs one listing of /dev/shm if there is no new file."""
        files = _shared_memory_files()
        new = files.keys() - self._seen
        if not new:
            return
        held = {name for pid in processes_of_run(self._folder) for name in held_shared_memory(pid)} & new
        with (self._folder / _LIST).open("a", encoding="utf-8") as file:
            file.writelines(f"{files[name]} {name}\n" for name in sorted(held))
        for name in new - held:  # its process may map it in a moment
            self._looks[name] = self._looks.get(name, 0) + 1
        foreign = {name for name in new - held if self._looks[name] >= _LOOKS}
        self._seen = (self._seen & files.keys()) | held | foreign
        self._looks = {name: looks for name, looks in self._looks.items() if name in files.keys() - self._seen}


def _shared_memory_files() -> dict[str, int]:
    """Return {name: inode} of this user's files in /dev/shm."""
    found = {}
    with suppress(FileNotFoundError), os.scandir(SHARED_MEMORY) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if status.st_uid == os.getuid():
                    found[entry.name] = status.st_ino
    return found


def clean(folder: Path) -> None:
    """Remove what a run has left on this machine: its processes, its shared memory, and its folder, in this order."""
    deadline = time.monotonic() + _OWN_END_SECONDS
    while processes_of_run(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    deadline = time.monotonic() + _KILL_SECONDS
    while (left := processes_of_run(folder)) and time.monotonic() < deadline:
        for pid in left:
            kill(pid)
        time.sleep(0.05)
    _unlink_shared_memory(folder / _LIST)
    shutil.rmtree(folder, ignore_errors=True)


def _unlink_shared_memory(listed: Path) -> None:
    if not listed.exists():
        return
    files = _shared_memory_files()
    held = {name for pid in own_processes() for name in held_shared_memory(pid)}
    for line in listed.read_text(encoding="utf-8").splitlines():
        inode, _, name = line.partition(" ")
        if name not in held and files.get(name) == int(inode):  # else the name belongs to another file by now
            (SHARED_MEMORY / name).unlink(missing_ok=True)


def remove_leftovers(parent: Path) -> list[Path]:
    """Clean up after the runs in `parent` of which launcher and cleaner were killed; return their folders."""
    removed = []
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            if folder.is_symlink() or status.st_uid != os.getuid() or _read_host(folder) != socket.gethostname():
                continue
            with (folder / _LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clean(folder)
            removed.append(folder)
    return removed


def _read_host(folder: Path) -> str:
    """Return the machine of a run: a TMPDIR may be shared by several, and locks and processes are those of one."""
    return (folder / _HOST).read_text(encoding="utf-8")


def _make_folder(parent: Path) -> tuple[Path, int]:
    """Create a run's folder, locked; return it and the descriptor of the lock.

    It gets its name when it is locked, so that no other start takes it for a leftover.
    """
    try:
        new = Path(tempfile.mkdtemp(prefix=".grpo_mega_new_", dir=parent))
        (new / _HOST).write_text(socket.gethostname(), encoding="utf-8")
        lock = os.open(new / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = parent / new.name.replace(".grpo_mega_new_", PREFIX)
        return new.rename(folder), lock
    except OSError as error:
        raise UserError(
            f"TMPDIR={parent}: no temporary folder can be made ({error.strerror})",
            remedy="set TMPDIR to a local folder that you can write",
        ) from error


@contextmanager
def run_temporaries() -> Iterator[Path]:
    """Make the temporary folder of a run and start its cleaner; at exit, let the cleaner remove all that is left.

    Raises:
        UserError: no folder can be made in TMPDIR.
    """
    parent = Path(tempfile.gettempdir())
    for leftover in remove_leftovers(parent):
        sys.stderr.write(f"launch: removed what the killed run {leftover.name} had left\n")
    folder, lock = _make_folder(parent)
    reading, writing = os.pipe()
    cleaner = subprocess.Popen(
        [sys.executable, "-m", "grpo_mega.launch.cleaner", str(folder), str(reading)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        pass_fds=(reading, lock),
        start_new_session=True,  # signals of the terminal are not for it
    )
    os.close(reading)
    assert cleaner.stdout is not None
    cleaner.stdout.readline()  # it maintains the list from now on: a rank may end as soon as it has started
    try:
        yield folder
    finally:
        os.close(writing)
        with suppress(subprocess.TimeoutExpired):
            cleaner.wait(_CLEANER_SECONDS)
        if folder.exists():  # the cleaner was killed
            clean(folder)
        cleaner.stdout.close()
        os.close(lock)


def run_environment(folder: Path) -> dict[str, str]:
    """Return the environment variables of the processes of a run. Caches that outlive a run stay where they were."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"}
    kept = {name: os.environ.get(name) or str(path) for name, path in caches.items()}
    return {**kept, "TMPDIR": str(folder), "SPT_NOENV": "1"}  # SPT_NOENV: setproctitle keeps the environment readable


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())

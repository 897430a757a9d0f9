"""A run leaves no process, shared memory or temporary file, whatever ends it; and removes nothing of another run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest

from grpo_mega.launch import run_temporaries
from grpo_mega.launch.processes import processes_of_run
from grpo_mega.types import UserError

# A rank with everything that a killed process leaves: a file, a segment, and a child in a session of its own, which
# ignores SIGTERM and has no parent-death signal.
RANK = """
import os, signal, subprocess, sys, tempfile, time
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *_: None  # the tracker would remove the segment
segment = shared_memory.SharedMemory(create=True, size=4096)
handle, path = tempfile.mkstemp()
sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
child = subprocess.Popen([sys.executable, "-S", "-c", sleep], start_new_session=True)
temporary = os.path.join(os.environ["PIDS"], "." + os.environ["RANK"])
open(temporary, "w").write(f"{child.pid} {segment.name} {path}")
os.rename(temporary, os.path.join(os.environ["PIDS"], os.environ["RANK"]))
if "END" in os.environ:
    time.sleep(0.5)
    os._exit(int(os.environ["END"]))
time.sleep(300)
"""
AGENT = f"""
import os, sys
from grpo_mega.launch.supervisor import run_ranks
sys.exit(run_ranks([sys.executable, "-c", {RANK!r}], [{{**os.environ, "RANK": str(r)}} for r in range(2)]))
"""


class Run:
    """A launcher with two ranks, which have made all that they leave."""

    def __init__(self, folder: Path, temporary: Path, **environment: str) -> None:
        folder.mkdir()
        env = {**os.environ, "PIDS": str(folder), "TMPDIR": str(temporary), **environment}
        self.launcher = psutil.Popen([sys.executable, "-c", AGENT], env=env, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 30
        while len([path for path in folder.iterdir() if not path.name.startswith(".")]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        words = [(folder / str(rank)).read_text().split() for rank in range(2)]
        self.children = [int(each[0]) for each in words]
        self.segments = [Path("/dev/shm") / each[1] for each in words]
        self.files = [Path(each[2]) for each in words]
        self.folder = self.files[0].parent
        time.sleep(0.3)

    @property
    def cleaner(self) -> psutil.Process:
        (found,) = [each for each in self.launcher.children() if "grpo_mega.launch.cleaner" in each.cmdline()]
        return found

    def left(self) -> list[str]:
        processes = [f"process {pid}" for pid in self.children if pid in processes_of_run(self.folder)]
        return [*processes, *(str(path) for path in (*self.segments, *self.files, self.folder) if path.exists())]

    def wait_until_clean(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.left() == []


@pytest.fixture
def temporary(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tmp"
    folder.mkdir()
    yield folder
    for left in list(folder.iterdir()):  # after a failed test
        run_temporaries.clean(left)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None])
def test_nothing_of_a_run_is_left_15_seconds_after_its_end(
    tmp_path: Path, temporary: Path, number: signal.Signals | None
) -> None:
    run = Run(tmp_path / "run", temporary, **({} if number else {"END": "1"}))
    assert number is None or len(run.left()) == 7
    assert run.folder.parent == temporary
    if number is not None:
        run.launcher.send_signal(number)
    run.launcher.wait(30)
    if number != signal.SIGKILL:
        assert run.left() == []  # the launcher waits for the cleaner
    run.wait_until_clean(15)
    assert list(temporary.iterdir()) == []


def test_the_next_start_removes_what_a_kill_of_everything_left_and_nothing_of_a_living_run(
    tmp_path: Path, temporary: Path
) -> None:
    killed, living = Run(tmp_path / "killed", temporary), Run(tmp_path / "living", temporary)
    for process in (killed.cleaner, killed.launcher):
        process.kill()
    killed.launcher.wait(10)
    time.sleep(0.5)
    assert len(killed.left()) == 7
    last = Run(tmp_path / "last", temporary, END="0")
    last.launcher.wait(30)
    assert f"removed what the killed run {killed.folder.name} had left" in last.launcher.stderr.read().decode()
    assert killed.left() == last.left() == []
    assert len(living.left()) == 7
    living.launcher.send_signal(signal.SIGKILL)
    living.wait_until_clean(15)


def test_shared_memory_that_another_program_holds_or_has_made_under_the_same_name_stays(tmp_path: Path) -> None:
    held, other = SharedMemory(create=True, size=16), SharedMemory(create=True, size=16)
    try:
        inode = (Path("/dev/shm") / other.name).stat().st_ino
        program = f"""
import sys, time
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *_: None
kept = shared_memory.SharedMemory(name={held.name!r})
print(flush=True)
time.sleep(60)
"""
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            listed = tmp_path / "shared_memory"
            inode_of_held = (Path("/dev/shm") / held.name).stat().st_ino
            listed.write_text(f"{inode_of_held} {held.name}\n{inode + 1} {other.name}\n999 missing\n")
            run_temporaries.clean(tmp_path)
            assert (Path("/dev/shm") / held.name).exists()
            assert (Path("/dev/shm") / other.name).exists()
            holder.kill()
    finally:
        for segment in (held, other):
            segment.close()
            segment.unlink()


def test_a_temporary_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "missing"))
    expected = r"TMPDIR=.*missing: no temporary folder can be made .*set TMPDIR to a local"
    with pytest.raises(UserError, match=expected), run_temporaries.run_temporaries():
        pass


def test_a_folder_of_another_machine_stays(tmp_path: Path) -> None:
    """Several machines may share a TMPDIR; the lock and the processes of another machine cannot be seen."""
    folder = tmp_path / f"{run_temporaries.PREFIX}x"
    folder.mkdir()
    (folder / "host").write_text("another-host")
    assert run_temporaries.remove_leftovers(tmp_path) == []
    (folder / "host").write_text(socket.gethostname())
    assert run_temporaries.remove_leftovers(tmp_path) == [folder]
    assert not folder.exists()

"""grpo_mega.launch.processes against a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from grpo_mega.launch import processes
from tests.helpers.signals import stop_process

PROGRAM = """
import signal, subprocess, sys, time
signal.signal(signal.SIGUSR2, lambda *_: None)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_process_is_found_by_its_folder_with_its_children_its_state_and_its_handlers(tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert sorted(processes.processes_of_run(tmp_path)) == sorted([process.pid, child])
        assert processes.processes_of_run(tmp_path / "other") == []
        assert processes.children(process.pid) == processes.descendants(process.pid) == [child]
        assert processes.catches(process.pid, signal.SIGUSR2)
        assert not processes.catches(child, signal.SIGUSR2)
        assert "time.sleep(60)" in processes.command_line(child)
        assert processes.state(process.pid) in "RSD"
        stop_process(process.pid)
        assert processes.state(process.pid) == "T"
        for pid in (process.pid, child):
            processes.kill(pid)
    assert processes.state(process.pid) == "X"
    processes.kill(process.pid)  # a process that has exited is ignored
    assert processes.command_line(process.pid) == ""
    assert processes.held_shared_memory(process.pid) == set()

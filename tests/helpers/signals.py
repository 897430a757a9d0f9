"""Signals to the processes of a training job while one of its ranks is in a phase."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from grpo_mega.parallel.heartbeat import FOLDER_VARIABLE, Beat, read_beats


def rank_processes(job: psutil.Popen) -> dict[int, psutil.Process]:
    """Return {rank: process} of a job that is running; empty if its ranks have not started."""
    found = {}
    with suppress(psutil.Error):
        for each in job.children(recursive=True):
            with suppress(psutil.Error):
                if "grpo_mega.train" in each.cmdline() and "RANK" in each.environ():
                    found[int(each.environ()["RANK"])] = each
    return found


def beat_of(process: psutil.Process, rank: int) -> Beat:
    """Return the last heartbeat of a rank."""
    return read_beats(Path(process.environ()[FOLDER_VARIABLE]))[rank]


def engine_process(rank: psutil.Process, name: str) -> psutil.Process:
    """Return the process of the rank's engine whose command line contains `name`."""
    return next(each for each in rank.children(recursive=True) if name in " ".join(each.cmdline()))


def stop_process(pid: int) -> None:
    """Send SIGSTOP and wait until all threads are stopped: a thread on another processor runs on for a moment."""
    os.kill(pid, signal.SIGSTOP)
    _wait_for_threads(pid, lambda state: state == "T")


def continue_process(pid: int) -> None:
    """Send SIGCONT and wait until no thread is stopped."""
    os.kill(pid, signal.SIGCONT)
    _wait_for_threads(pid, lambda state: state != "T")


def _wait_for_threads(pid: int, is_reached: Callable[[str], bool]) -> None:
    deadline = time.monotonic() + 60
    while not all(is_reached(state) for state in _thread_states(pid)):
        assert time.monotonic() < deadline, f"process {pid}: its threads have the states {_thread_states(pid)}"
        time.sleep(0.005)


def _thread_states(pid: int) -> list[str]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [(each / "stat").read_text().rpartition(")")[2].split()[0] for each in threads]


def act_in_phase(job: psutil.Popen, phase: str, step: int, action: Callable[[psutil.Process], object]) -> None:
    """Call `action` with the process of rank 0 while it is in a phase of a step of this start, or of a later one.

    The process is stopped meanwhile, and for half a second afterwards, so that it does not leave the phase before.
    """
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and job.poll() is None:
        process = rank_processes(job).get(0)
        while process is not None and process.is_running() and time.monotonic() < deadline:
            beat = beat_of(process, 0)
            if beat.pid and beat.phase == phase and beat.step >= step:
                process.suspend()
                time.sleep(0.05)
                is_there = beat_of(process, 0).phase == phase
                if is_there:
                    action(process)
                    time.sleep(0.5)
                process.resume()
                if is_there:
                    return
            time.sleep(0.002)
        time.sleep(0.02)
    raise AssertionError(f"rank 0 was not found in phase {phase} (exit code {job.poll()})")

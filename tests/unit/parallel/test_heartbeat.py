"""Heartbeats: what a rank writes, another process reads, also while the rank is stopped or waits in a library."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel import heartbeat
from grpo_mega.parallel.heartbeat import Beat, RankHeartbeat, make_heartbeats, read_beats
from grpo_mega.parallel.ports import free_port
from tests.helpers.signals import stop_process

RANK = """
import os, sys, time
import torch, torch.distributed as dist
from grpo_mega.parallel.heartbeat import heartbeat_of_this_rank, write_stacks_on_signal
write_stacks_on_signal()
beat = heartbeat_of_this_rank()
dist.init_process_group("gloo")
beat.step()
beat.phase("train")
for _ in range(3):
    dist.all_reduce(torch.ones(1))
if os.environ["RANK"] == "1":
    time.sleep(0.8)  # a sample
    print("ready", flush=True)
    time.sleep(60)
dist.all_reduce(torch.ones(1))
"""


def test_a_rank_without_a_launcher_writes_nothing_and_a_new_slot_says_start(tmp_path: Path) -> None:
    silent = RankHeartbeat(None, 0)
    silent.phase("train")
    silent.step()
    make_heartbeats(tmp_path, 3)
    assert read_beats(tmp_path) == [Beat()] * 3
    assert Beat().phase == "start"


def test_phases_steps_and_counters_of_a_rank_are_read_from_the_file(tmp_path: Path) -> None:
    make_heartbeats(tmp_path, 2)
    beat = RankHeartbeat(tmp_path, 1)
    steps = [0]
    beat.count(lambda: steps[0])
    timer = PhaseTimer(heartbeat=beat)
    timer.start_step()
    with timer.phase("rollout"):
        first = read_beats(tmp_path)[1]
        with timer.phase("reward"):
            steps[0] = 7
            time.sleep(2 * heartbeat._SAMPLE_SECONDS)
            second = read_beats(tmp_path)[1]
        third = read_beats(tmp_path)[1]
    assert [each.phase for each in (first, second, third)] == ["rollout", "reward", "rollout"]
    assert (first.pid, first.step, first.engine_steps) == (os.getpid(), 1, 0)
    assert (second.engine_steps, second.entered_phases) == (7, first.entered_phases + 1)
    assert second.progress > first.progress
    assert abs(third.phase_started - time.monotonic()) < 5
    assert read_beats(tmp_path)[0] == Beat()


@pytest.mark.timeout(120)
def test_collectives_and_stacks_of_ranks_that_wait_in_gloo_or_are_stopped(tmp_path: Path) -> None:
    make_heartbeats(tmp_path, 2)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env = {**os.environ, **shared, heartbeat.FOLDER_VARIABLE: str(tmp_path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE
        )
        for r in range(2)
    ]
    try:
        assert ranks[1].stdout is not None
        assert ranks[1].stdout.readline() == b"ready\n"
        stop_process(ranks[1].pid)
        waiting, stopped = read_beats(tmp_path)
        assert [waiting.pid, stopped.pid] == [rank.pid for rank in ranks]
        assert (waiting.phase, waiting.step) == (stopped.phase, stopped.step) == ("train", 1)
        assert sum(waiting.collectives.values()) == sum(stopped.collectives.values()) + 1  # the one that it waits in
        ranks[0].send_signal(heartbeat.STACKS_SIGNAL)
        file = heartbeat.stacks_file(tmp_path, ranks[0].pid)
        deadline = time.monotonic() + 10
        while "all_reduce" not in file.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert ranks[0].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(10)


def test_a_slot_that_is_being_written_is_read_without_collectives(tmp_path: Path) -> None:
    make_heartbeats(tmp_path, 1)
    beat = RankHeartbeat(tmp_path, 0)
    beat.phase("sync")
    time.sleep(0.2)
    content = bytearray((tmp_path / "heartbeats").read_bytes())
    content[heartbeat._GROUPS_AT : heartbeat._GROUPS_AT + 6] = b'{"0": '
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "heartbeats").write_bytes(content)
    (found,) = read_beats(tmp_path / "copy")
    assert (found.phase, found.collectives) == ("sync", {})


EXITING = """
import atexit, os, sys, threading
def check():
    if any(thread.name == "heartbeat" for thread in threading.enumerate()):
        os._exit(1)
atexit.register(check)  # functions that are registered later run earlier
from grpo_mega.parallel import heartbeat
beat = heartbeat.heartbeat_of_this_rank()
assert any(thread.name == "heartbeat" for thread in threading.enumerate())
"""


def test_the_thread_has_stopped_when_python_exits(tmp_path: Path) -> None:
    """In a library of C++ at that moment it would abort the process: terminate called without an active exception."""
    make_heartbeats(tmp_path, 1)
    env = {**os.environ, "LOCAL_RANK": "0", heartbeat.FOLDER_VARIABLE: str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", EXITING], env=env, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr

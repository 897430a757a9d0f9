"""The report of a stall: who waits for whom, and the stacks of real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_mega.launch.stall_report import awaited_ranks, collect_stacks, is_waiting, make_report
from grpo_mega.launch.stall_watch import RankStatus
from grpo_mega.parallel.heartbeat import FOLDER_VARIABLE, OTHER_RANKS, make_heartbeats
from tests.helpers.signals import stop_process

OTHER_THREAD = 'Thread 0x1 (most recent call first):\n  File "/x/torch/distributed/c10d.py", line 1 in f\n\n'
IN_COLLECTIVE = (
    'Current thread 0x2 (most recent call first):\n  File "/x/torch/distributed/d.py", line 7 in all_reduce\n'
)
IN_TRANSPORT = (
    'Thread 0x2 (most recent call first):\n  File "/x/grpo_mega/weight_sync/transports/shared_memory.py", line 1'
)
BUSY = OTHER_THREAD + 'Current thread 0x2 (most recent call first):\n  File "/x/reward.py", line 9 in compute\n'


def rank(
    number: int, *, step: int = 3, collectives: int = 10, stopped: tuple[int, ...] = (), awaited: str = ""
) -> RankStatus:
    return RankStatus(number, "host", 100 + number, "train", step, collectives, 61.0, 60.0, stopped, awaited=awaited)


def test_a_rank_waits_if_its_main_thread_is_in_a_collective() -> None:
    assert is_waiting(IN_COLLECTIVE)
    assert is_waiting(IN_TRANSPORT)
    assert not is_waiting(BUSY)
    assert not is_waiting("no stacks: the process is stopped")


def test_the_others_wait_for_a_stopped_rank_else_for_one_that_does_not_wait_else_for_the_last() -> None:
    def numbers(ranks: list[RankStatus], stacks: dict[int, str]) -> list[int]:
        return [each.rank for each in awaited_ranks(ranks, stacks)]

    all_wait = dict.fromkeys(range(3), IN_COLLECTIVE)
    assert numbers([rank(0), rank(1, stopped=(101,)), rank(2, step=1)], {**all_wait, 0: BUSY}) == [1]
    assert numbers([rank(0), rank(1), rank(2, step=1)], {**all_wait, 0: BUSY}) == [0]
    assert numbers([rank(0), rank(1, collectives=9), rank(2)], all_wait) == [1]
    threads = [rank(0, awaited="the call of its thread scoring"), rank(1, awaited=OTHER_RANKS), rank(2, step=1)]
    assert numbers(threads, {**all_wait, 1: BUSY}) == [0]
    assert numbers([rank(0), rank(1, collectives=9), rank(2, step=2, collectives=20)], all_wait) == [2]


def test_the_last_line_names_the_rank_that_is_awaited_and_those_that_wait() -> None:
    stopped = RankStatus(1, "host1", 7, "rollout", 3, 9, 65.0, 60.0, (9,), (8, 9))
    text = make_report([rank(0), stopped], {0: IN_COLLECTIVE, 1: BUSY}, ["machine 2 (host2)"])
    lines = text.splitlines()
    assert lines[-1] == (
        "launch: the job has stalled (limit of phase rollout: 60 s; guard.phase_limits): rank 1 makes no progress; "
        "waiting for it: 0"
    )
    assert lines[-2] == "launch: the launcher of machine 2 (host2) does not respond"
    assert "rank 1 (process 7 on host1): no progress for 65 s in phase rollout, step 3 of this start" in text
    assert "process 9 of its engine is stopped (SIGSTOP, or a debugger)" in text
    assert IN_COLLECTIVE in text


def test_many_ranks_are_shown_in_part() -> None:
    text = make_report([rank(number) for number in range(200)], dict.fromkeys(range(200), IN_COLLECTIVE))
    assert text.count("launch: stacks of rank") == 16
    assert "launch: 184 more ranks" in text


PROGRAM = """
import sys, time
from grpo_mega.parallel.heartbeat import write_stacks_on_signal
if sys.argv[1] == "answers":
    write_stacks_on_signal()
def in_this_function():
    print("ready", flush=True)
    time.sleep(60)
in_this_function()
"""


def test_stacks_of_a_process_that_answers_one_that_is_stopped_and_one_without_a_handler_which_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without py-spy
    make_heartbeats(tmp_path, 1)
    env = {**os.environ, FOLDER_VARIABLE: str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, kind], env=env, stdout=subprocess.PIPE)
        for kind in ("answers", "answers", "does not")
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        stop_process(started[1].pid)
        begin = time.monotonic()
        found = collect_stacks(tmp_path, [process.pid for process in started])
        assert time.monotonic() - begin < 5
        assert "in in_this_function" in found[started[0].pid]
        assert found[started[1].pid] == "no stacks: the process is stopped (state T: SIGSTOP, or a debugger)"
        assert found[started[2].pid].startswith("no stacks: the process did not answer SIGUSR2 (state S)")
        assert started[2].poll() is None
    finally:
        for process in started:
            process.kill()
            process.wait(10)

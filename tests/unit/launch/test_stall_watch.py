"""Limits and progress of ranks, with heartbeats that the test writes and a clock that it sets."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_mega.launch import processes
from grpo_mega.launch.stall_watch import RankStatus, StallLimits, StallWatch, has_stalled
from grpo_mega.parallel import heartbeat
from grpo_mega.parallel.heartbeat import RankHeartbeat, make_heartbeats
from tests.helpers.signals import continue_process, stop_process


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])
    yield started
    started.kill()
    started.wait(10)


@pytest.fixture
def beat(tmp_path: Path) -> RankHeartbeat:
    make_heartbeats(tmp_path, 1)
    return RankHeartbeat(tmp_path, 0)


def watch(folder: Path, process: subprocess.Popen[bytes], clock: Clock, **phases: float) -> StallWatch:
    return StallWatch(folder, [process.pid], [4], StallLimits(600.0, phases), clock)


def status(watched: StallWatch) -> RankStatus:
    (found,) = watched.statuses()
    return found


def test_the_limit_is_that_of_the_config_else_six_medians_and_at_least_a_minute(
    tmp_path: Path, process: subprocess.Popen[bytes], beat: RankHeartbeat
) -> None:
    clock = Clock()
    watched = watch(tmp_path, process, clock, sync=3.0)
    assert status(watched).limit_seconds == math.inf  # the start may read for an hour
    for seconds in (20.0, 40.0, 30.0):
        beat.step()
        for phase, factor in (("rollout", 1.0), ("train", 0.1), ("sync", 0.1)):
            beat.phase(phase)
            status(watched)
            clock.now += seconds * factor
    beat.step()
    beat.phase("train")
    assert status(watched).limit_seconds == 60.0  # six medians are 18 s
    beat.phase("rollout")
    assert status(watched).limit_seconds == 6 * 30.0
    beat.phase("sync")
    assert status(watched).limit_seconds == 3.0
    beat.phase("evaluation")
    assert status(watched).limit_seconds == 600.0  # guard.timeout_seconds: not measured yet


def test_the_median_is_of_a_step_also_if_a_nested_phase_divides_the_phase(
    tmp_path: Path, process: subprocess.Popen[bytes], beat: RankHeartbeat
) -> None:
    clock = Clock()
    watched = watch(tmp_path, process, clock)
    beat.step()
    for _ in range(20):
        for phase in ("rollout", "reward"):
            beat.phase(phase)
            status(watched)
            clock.now += 2.0
    status(watched)
    beat.step()
    beat.phase("rollout")
    assert status(watched).limit_seconds == 6 * 40.0


def test_each_kind_of_progress_starts_the_time_again(
    tmp_path: Path, process: subprocess.Popen[bytes], beat: RankHeartbeat
) -> None:
    clock, counter = Clock(), [0]
    watched = watch(tmp_path, process, clock)
    beat.count(lambda: counter[0])
    beat.phase("train")
    for move in (beat.step, lambda: beat.phase("train"), lambda: counter.__setitem__(0, 1)):
        status(watched)
        clock.now += 50
        assert status(watched).idle_seconds == 50
        move()
        beat._write()
        assert status(watched).idle_seconds == 0


@pytest.mark.parametrize(
    ("phase", "kib_per_second", "idle_seconds"),
    [("start", 80, 0.0), ("checkpoint", 80, 0.0), ("rollout", 2, 40.0), ("train", 80, 40.0)],
)
def test_reading_at_a_rate_is_progress_in_phases_that_read_files_and_a_little_reading_is_not(
    tmp_path: Path,
    process: subprocess.Popen[bytes],
    beat: RankHeartbeat,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    kib_per_second: int,
    idle_seconds: float,
) -> None:
    """The metrics of the hardware read about 1 KiB/s in rank 0 all the time."""
    clock, read = Clock(), [10**9]
    monkeypatch.setattr(processes, "file_bytes", lambda _: read[0])
    watched = watch(tmp_path, process, clock)
    beat.phase(phase)
    status(watched)
    for _ in range(20):
        clock.now += 2
        read[0] += 2 * 1024 * kib_per_second
        found = status(watched)
    assert found.idle_seconds == idle_seconds


def test_while_ranks_wait_for_threads_only_the_work_of_the_threads_is_progress(
    tmp_path: Path, process: subprocess.Popen[bytes], beat: RankHeartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is not six medians: a phase in which groups were ready says nothing about the time of a slice."""
    clock, counter, collectives = Clock(), [0], [0]
    monkeypatch.setattr(heartbeat, "_collectives", lambda: {"0": collectives[0]})
    watched = watch(tmp_path, process, clock, evaluation=9.0)
    beat.count(lambda: counter[0])
    for _ in range(3):
        beat.step()
        beat.phase("rollout")
        status(watched)
        clock.now += 1

    def move(number: list[int]) -> RankStatus:
        clock.now += 50
        number[0] += 1
        time.sleep(1.5 * heartbeat._SAMPLE_SECONDS)
        return status(watched)

    assert move(collectives).idle_seconds == 0
    with beat.waiting_for(lambda: "the call of its thread scoring"):
        found = status(watched)
        assert (found.limit_seconds, found.awaited) == (600.0 + 60.0, "the call of its thread scoring")
        assert move(collectives).idle_seconds == 50
        assert move(counter).idle_seconds == 0
        beat.phase("evaluation")
        assert status(watched).limit_seconds == 9.0
    beat.phase("rollout")
    found = status(watched)
    assert (found.limit_seconds, found.awaited) == (60.0, "")
    assert move(collectives).idle_seconds == 0


def test_a_stopped_rank_is_late_after_a_minute_in_a_phase_that_was_never_measured(
    tmp_path: Path, process: subprocess.Popen[bytes], beat: RankHeartbeat
) -> None:
    clock = Clock()
    watched = watch(tmp_path, process, clock)
    status(watched)
    stop_process(process.pid)
    clock.now += 59
    assert not has_stalled([status(watched)])
    clock.now += 2
    found = status(watched)
    assert (found.rank, found.stopped, found.limit_seconds) == (4, (process.pid,), 60.0)
    assert has_stalled([found])
    continue_process(process.pid)
    assert not has_stalled([status(watched)])


def test_a_rank_that_exited_is_not_watched(
    tmp_path: Path, process: subprocess.Popen[bytes], beat: RankHeartbeat
) -> None:
    process.kill()
    process.wait(10)
    assert watch(tmp_path, process, Clock()).statuses() == []
    assert not has_stalled([])


def test_a_job_stalls_if_a_late_rank_is_stopped_or_if_all_ranks_are_late() -> None:
    def rank(idle: float, stopped: tuple[int, ...] = ()) -> RankStatus:
        return RankStatus(0, "host", 1, "train", 1, 1, idle, 60.0, stopped)

    assert not has_stalled([rank(100), rank(5)])  # one waits for the other, which makes progress
    assert has_stalled([rank(100), rank(61)])
    assert has_stalled([rank(100, (1,)), rank(5)])
    assert not has_stalled([rank(50, (1,)), rank(5)])


def test_a_status_survives_the_way_to_another_machine() -> None:
    for limit in (60.0, math.inf):
        sent = RankStatus(3, "host", 1, "train", 2, 9, 1.5, limit, (1, 2), (2,), "other ranks")
        assert RankStatus.from_json(json.loads(json.dumps(sent.to_json()))) == sent

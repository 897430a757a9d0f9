"""Launchers that agree over real connections that a job has stalled."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest

from grpo_mega.launch import stall_agreement
from grpo_mega.launch.rendezvous import NodeInfo, Rendezvous, rendezvous
from grpo_mega.launch.stall_agreement import StallAgreement
from grpo_mega.launch.stall_watch import RankStatus
from grpo_mega.parallel.ports import free_port


class Watch:
    """A `StallWatch` with statuses that the test sets."""

    def __init__(self, *statuses: RankStatus) -> None:
        self.found = list(statuses)

    def is_due(self) -> bool:
        return True

    def statuses(self) -> list[RankStatus]:
        return self.found


def rank(number: int, idle: float, *, stopped: bool = False) -> RankStatus:
    pid = 100 + number
    return RankStatus(number, f"host{number}", pid, "train", 3, 10, idle, 60.0, (pid,) if stopped else ())


@pytest.fixture
def meetings() -> Iterator[list[Rendezvous]]:
    """Three machines that have joined."""
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        joined = list(pool.map(lambda i: rendezvous(NodeInfo(i, 3, 1, f"host{i}"), "127.0.0.1", port, 20.0), range(3)))
    yield joined
    for meeting in joined:
        meeting.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall_agreement, "collect_stacks", lambda _, pids: {pid: f"stack of {pid}" for pid in pids})


def agreements(
    meetings: list[Rendezvous], watches: list[Watch], folder: Path, silence: float = 60.0
) -> tuple[list[StallAgreement], SimpleQueue[tuple[int, str]]]:
    failures: SimpleQueue[tuple[int, str]] = SimpleQueue()
    found = []
    for i, (meeting, watch) in enumerate(zip(meetings, watches, strict=True)):
        each = StallAgreement(watch, folder, meeting, is_first=i == 0, silence_seconds=silence)  # type: ignore[arg-type]
        meeting.watch(lambda code, text: failures.put((code, text)), each.receive)
        found.append(each)
    return found, failures


def run_until(check: Callable[[], str | None], others: list[StallAgreement], seconds: float) -> str | None:
    """Call `check` as a launcher does, and the others' too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for each in others:
            assert each.check() is None
        if (report := check()) is not None:
            return report
        time.sleep(0.05)
    return None


def test_machine_0_reports_a_stopped_rank_of_another_machine_with_the_stacks_of_all(
    meetings: list[Rendezvous], tmp_path: Path
) -> None:
    watches = [Watch(rank(0, 62)), Watch(rank(1, 63, stopped=True)), Watch(rank(2, 61))]
    (first, *others), failures = agreements(meetings, watches, tmp_path)
    report = run_until(first.check, others, 15)
    assert report is not None
    assert report.splitlines()[-1].endswith("rank 1 makes no progress; waiting for it: 0, 2")
    assert all(f"stack of {100 + number}" in report for number in range(3))
    meetings[0].report_failure(1, report)
    assert {failures.get(timeout=5) for _ in range(2)} == {(1, report)}


def test_a_rank_that_makes_progress_on_any_machine_keeps_the_job_running(
    meetings: list[Rendezvous], tmp_path: Path
) -> None:
    watches = [Watch(rank(0, 62)), Watch(rank(1, 5)), Watch(rank(2, 61))]
    (first, *others), _ = agreements(meetings, watches, tmp_path)
    assert run_until(first.check, [], 0.5) is None  # the statuses of the other machines are not known yet
    assert run_until(first.check, others, 1.5) is None
    watches[1].found = [rank(1, 61)]
    assert run_until(first.check, others, 10) is not None


def test_a_launcher_that_sends_nothing_is_reported_by_machine_0_and_machine_0_by_the_others(
    meetings: list[Rendezvous], tmp_path: Path
) -> None:
    watches = [Watch(rank(0, 1)), Watch(rank(1, 1)), Watch(rank(2, 1))]
    (first, second, _), _ = agreements(meetings, watches, tmp_path, silence=2.0)
    begin = time.monotonic()
    report = run_until(first.check, [], 20)
    assert report is not None
    assert "launch: the launcher of machine 1 (host1) does not respond" in report
    assert "launch: the launcher of machine 2 (host2) does not respond" in report
    assert time.monotonic() - begin < 2.0 + 10
    report = run_until(second.check, [], 20)
    assert report is not None
    assert "launch: the launcher of machine 0 (host0) does not respond" in report


def test_a_machine_whose_ranks_have_succeeded_is_not_waited_for(meetings: list[Rendezvous], tmp_path: Path) -> None:
    watches = [Watch(rank(0, 1)), Watch(rank(1, 1)), Watch(rank(2, 1))]
    (first, second, _), _ = agreements(meetings, watches, tmp_path, silence=2.0)
    meetings[2].__exit__(None, None, None)
    assert run_until(first.check, [second], 4) is None


def test_one_machine_decides_alone(tmp_path: Path) -> None:
    watch = Watch(rank(0, 61), rank(1, 59))
    alone = StallAgreement(watch, tmp_path, None, is_first=True)  # type: ignore[arg-type]
    assert alone.check() is None
    watch.found = [rank(0, 61), rank(1, 61)]
    report = alone.check()
    assert report is not None
    assert "stack of 100" in report


def test_a_start_without_a_limit_never_stalls(tmp_path: Path) -> None:
    endless = RankStatus(0, "host", 1, "start", 0, 0, 1e6, math.inf)
    assert StallAgreement(Watch(endless), tmp_path, None, is_first=True).check() is None  # type: ignore[arg-type]

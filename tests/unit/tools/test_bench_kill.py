"""tools/bench_kill.py: which rank is killed, and the moments of its reason and of the end of the job."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tools import bench_kill

# A launcher with two ranks, which names the second one if one of them is gone, and exits.
LAUNCHER = """
import os, subprocess, sys, time
command = [sys.executable, "-S", "-c", "import time; time.sleep(60)", "grpo_mega.train"]
ranks = [subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}) for rank in range(2)]
while all(rank.poll() is None for rank in ranks):
    time.sleep(0.01)
sys.stderr.write("launch: rank 1 was ended by SIGKILL\\n")
ranks[0].kill()
sys.exit(1)
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[psutil.Popen]:
    with (tmp_path / "screen").open("wb") as screen:
        process = psutil.Popen([sys.executable, "-S", "-c", LAUNCHER], stderr=screen)
    while len(process.children()) < 2 or not all("grpo_mega.train" in each.cmdline() for each in process.children()):
        assert process.poll() is None
    yield process
    bench_kill.kill_with_children(process)


def test_a_killed_rank_is_measured_up_to_its_reason_and_the_end_of_the_job(job: psutil.Popen, tmp_path: Path) -> None:
    victim = bench_kill.rank_process(job, 1)
    assert victim.environ()["RANK"] == "1"
    reason_seconds, end_seconds = bench_kill.measure_kill(job, 1, victim, tmp_path / "screen")
    assert 0 < reason_seconds <= end_seconds
    assert job.returncode == 1
    with pytest.raises(RuntimeError, match="the job ended with exit code 1 before step 2"):
        bench_kill.wait_for_steps(job, tmp_path / "metrics.jsonl", 2)


def test_a_reason_that_does_not_appear_is_an_error(
    job: psutil.Popen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_kill, "END_SECONDS", 1.0)
    victim = bench_kill.rank_process(job, 0)  # the launcher names rank 1
    with pytest.raises(RuntimeError, match=r"after 1 s the job .*; rank 0 was not named"):
        bench_kill.measure_kill(job, 0, victim, tmp_path / "screen")

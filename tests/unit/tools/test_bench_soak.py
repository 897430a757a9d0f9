"""tools/bench_soak.py: what counts as growth, and how a job that ends is reported."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from tools import bench_soak


@pytest.mark.parametrize(
    ("late", "grew"),
    [
        ((102_000_000, 5, 9), False),
        ((102_100_000, 5, 9), True),
        ((100_000_000, 6, 9), True),
        ((100_000_000, 5, 10), True),
        ((90_000_000, 4, 8), False),
    ],
)
def test_memory_above_the_limit_and_more_threads_or_files_are_growth(late: bench_soak.Usage, grew: bool) -> None:
    rows = bench_soak.compare({"a": (100_000_000, 5, 9), "gone": (1, 1, 1)}, {"a": late, "new": (1, 1, 1)})
    assert [(row["process"], row["grew"]) for row in rows] == [("a", grew)]


def test_the_usage_of_each_process_of_a_job_is_read_and_its_end_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_soak, "READING_SECONDS", 0.02)
    script = "import time; blocks = bytearray(30_000_000); time.sleep(60)"
    job = psutil.Popen([sys.executable, "-S", "-c", script])
    try:
        ((name, (memory, threads, files)),) = bench_soak.measure(job).items()
        assert name.startswith(f"{job.pid} ")
        assert memory > 1_000_000
        assert (threads, files >= 3) == (1, True)
    finally:
        job.kill()
        job.wait(10)
    with pytest.raises(RuntimeError, match="the job ended with exit code -9 after step 0"):
        bench_soak.wait_for_step(job, tmp_path / "metrics.jsonl", 1)

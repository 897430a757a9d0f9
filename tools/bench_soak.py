"""Measure what a long run keeps: memory, threads and open files of each of its processes, early and at the end.

    python tools/bench_soak.py --steps 1000 --early 100

runs the quickstart with steps of 32 rollouts, and compares every process after step 1,000 with itself after step 100.
Each value is the smallest of five readings within a few steps, so that buffers of one step do not count. Exits with 1
if the resident memory of a process is more than 1.02 times as large, or if it has more threads or open files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from grpo_mega.cli.chaos_run import kill_with_children  # noqa: E402

LIMIT = 1.02
READINGS, READING_SECONDS, STEP_SECONDS = 5, 0.5, 600.0
CONFIG = (
    "quickstart",
    "data.prompts_per_step=8",
    "sampling.group_size=4",
    "train.minibatches_per_epoch=2",
    "checkpoint.every=50",
    "data.eval=null",
)
Usage = tuple[int, int, int]
"""Resident bytes, threads and open files of a process."""


def measure(job: psutil.Popen) -> dict[str, Usage]:
    """Return the usage of each process of a job, by its number and command; the smallest of several readings."""
    found: dict[str, Usage] = {}
    for _ in range(READINGS):
        for process in [job, *job.children(recursive=True)]:
            with suppress(psutil.Error):
                now = process.memory_info().rss, process.num_threads(), process.num_fds()
                name = f"{process.pid} {' '.join(process.cmdline())[:60]}"
                before = found.get(name, now)
                found[name] = (min(now[0], before[0]), min(now[1], before[1]), min(now[2], before[2]))
        time.sleep(READING_SECONDS)
    return found


def wait_for_step(job: psutil.Popen, metrics: Path, step: int) -> None:
    """Wait until the line of a step is written.

    Raises:
        RuntimeError: the job ended, or made no step for ten minutes.
    """
    last, since = 0, time.monotonic()
    while last < step:
        if job.poll() is not None:
            raise RuntimeError(f"the job ended with exit code {job.returncode} after step {last}")
        now = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if now > last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > STEP_SECONDS:
            raise RuntimeError(f"no step for {STEP_SECONDS:g} s after step {last}")
        time.sleep(0.1)


def compare(early: dict[str, Usage], late: dict[str, Usage]) -> list[dict[str, object]]:
    """Return one row per process that lives at both moments."""
    rows: list[dict[str, object]] = []
    for name in early.keys() & late.keys():
        (memory, threads, files), (memory_late, threads_late, files_late) = early[name], late[name]
        grew = memory_late > LIMIT * memory or threads_late > threads or files_late > files
        rows.append(
            {
                "process": name,
                "resident_mb": [round(memory / 1e6, 1), round(memory_late / 1e6, 1)],
                "ratio": round(memory_late / memory, 4),
                "threads": [threads, threads_late],
                "files": [files, files_late],
                "grew": grew,
            }
        )
    return sorted(rows, key=lambda row: str(row["process"]))


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--early", type=int, default=100)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the config")
    args = parser.parse_args(argv)
    if not 0 < args.early < args.steps:
        parser.error(f"--early={args.early} must be between 0 and --steps={args.steps}")
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        words = [*CONFIG, f"train.steps={args.steps + 50}", f"run.dir={run}", *args.overrides]
        with log.open("wb") as output:
            job = psutil.Popen(
                [sys.executable, "-m", "grpo_mega.cli.main", "train", *words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            begin = time.monotonic()
            wait_for_step(job, run / "metrics.jsonl", args.early)
            early = measure(job)
            wait_for_step(job, run / "metrics.jsonl", args.steps)
            rows = compare(early, measure(job))
            seconds = time.monotonic() - begin
        except RuntimeError as error:
            sys.stderr.write(f"{error}; the end of its output:\n{log.read_text(errors='replace')[-3000:]}\n")
            return 1
        finally:
            kill_with_children(job)
    for row in rows:
        print(json.dumps(row))
    grown = [row for row in rows if row["grew"]]
    print(f"{len(rows)} processes, steps {args.early} to {args.steps} in {seconds:.0f} s: {len(grown)} have grown")
    return 1 if grown or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

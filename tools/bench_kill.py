"""Measure the seconds from SIGKILL of a rank to the reason on the screen, and to the end of the command.

    python tools/bench_kill.py --trials 3

runs the quickstart on two ranks with steps of 32 rollouts, and kills one of the ranks at a random moment after the
second step: rank 0 in the first trial, rank 1 in the second, and so on. Exits with 1 if a reason took more than 5 s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
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

LIMIT_SECONDS = 5.0
NUM_RANKS, START_SECONDS, END_SECONDS, STEP_SECONDS, POLL_SECONDS = 2, 300.0, 60.0, 2.0, 0.01
CONFIG = (
    "quickstart",
    f"run.world_size={NUM_RANKS}",
    "data.prompts_per_step=8",
    "sampling.group_size=4",
    "train.minibatches_per_epoch=2",
    "train.steps=1000",
    "data.eval=null",
)


def rank_process(job: psutil.Popen, rank: int) -> psutil.Process:
    """Return the process of a rank.

    Raises:
        RuntimeError: it is not running.
    """
    for each in job.children(recursive=True):
        with suppress(psutil.Error):
            if "grpo_mega.train" in each.cmdline() and each.environ().get("RANK") == str(rank):
                return each
    raise RuntimeError(f"rank {rank} is not running")


def wait_for_steps(job: psutil.Popen, metrics: Path, number: int) -> None:
    """Wait until the run has made `number` steps.

    Raises:
        RuntimeError: the job ended, or has not made them after five minutes.
    """
    deadline = time.monotonic() + START_SECONDS
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < number:
        if job.poll() is not None:
            raise RuntimeError(f"the job ended with exit code {job.returncode} before step {number}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"step {number} was not reached within {START_SECONDS:g} s")
        time.sleep(POLL_SECONDS)


def measure_kill(job: psutil.Popen, rank: int, victim: psutil.Process, screen: Path) -> tuple[float, float]:
    """Kill a rank; return the seconds until the launcher has named it on the screen, and until the job has exited.

    Raises:
        RuntimeError: one of them took more than a minute.
    """
    reason = f"launch: rank {rank} was ended by SIGKILL".encode()
    begin, reason_seconds = time.monotonic(), 0.0
    victim.send_signal(signal.SIGKILL)
    while time.monotonic() < begin + END_SECONDS:
        is_over = job.poll() is not None
        if not reason_seconds and reason in screen.read_bytes():
            reason_seconds = time.monotonic() - begin
        if is_over and reason_seconds:
            return reason_seconds, time.monotonic() - begin
        time.sleep(POLL_SECONDS)
    what = "the job is still running" if job.poll() is None else "the job has exited"
    raise RuntimeError(f"after {END_SECONDS:g} s {what}; rank {rank} was {'' if reason_seconds else 'not '}named")


def trial(number: int, moment: float, folder: Path) -> dict[str, object]:
    """Run a job, kill a rank `moment` seconds after its second step, and return the measurement."""
    run, screen, rank = folder / f"run_{number}", folder / f"screen_{number}", number % NUM_RANKS
    with screen.open("wb") as output:
        job = psutil.Popen(
            [sys.executable, "-m", "grpo_mega.cli.main", "train", *CONFIG, f"run.dir={run}"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for_steps(job, run / "metrics.jsonl", 2)
        victim = rank_process(job, rank)
        time.sleep(moment)
        reason_seconds, end_seconds = measure_kill(job, rank, victim, screen)
    except RuntimeError as error:
        text = screen.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{error}; the end of its output:\n{text[-3000:]}") from error
    finally:
        kill_with_children(job)
    return {
        "trial": number,
        "rank": rank,
        "reason_seconds": round(reason_seconds, 2),
        "end_seconds": round(end_seconds, 2),
        "exit_code": job.returncode,
        "load_average": round(os.getloadavg()[0], 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    if args.trials < 1:
        parser.error(f"--trials={args.trials} must be at least 1")
    moments, slowest = random.Random(args.seed), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.trials):
            try:
                row = trial(number, moments.uniform(0.0, STEP_SECONDS), Path(folder))
            except RuntimeError as error:
                sys.stderr.write(f"{error}\n")
                return 1
            print(json.dumps(row), flush=True)
            slowest = max(slowest, float(str(row["reason_seconds"])))
    print(f"{args.trials} trials: the slowest reason took {slowest:.2f} s (limit {LIMIT_SECONDS:g} s)")
    return 1 if slowest > LIMIT_SECONDS else 0


if __name__ == "__main__":
    sys.exit(main())

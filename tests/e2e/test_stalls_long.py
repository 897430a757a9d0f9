"""SIGSTOP of each rank in each phase: the launcher names rank, machine and phase within the limit, and ends the job."""

from __future__ import annotations

import re
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from grpo_mega.parallel.heartbeat import OUTSIDE
from tests.helpers.jobs import SMALL, running_job
from tests.helpers.signals import beat_of, rank_processes

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
LIMIT, START_LIMIT, REPORT_SECONDS = 10.0, 30.0, 10.0
PHASES = ("start", "rollout", "reward", "log_probs", "train", "sync", "checkpoint", "evaluation", OUTSIDE)
KEYS = (
    *(key for key in SMALL if key != "data.eval=null"),
    "run.world_size=2",
    "train.steps=400",
    "checkpoint.every=1",
    "evaluation.every=1",
    "evaluation.k=1",
    "evaluation.max_prompts=4",
)


def stop_in_phase(job: psutil.Popen, rank: int, phase: str, seconds: float) -> None:
    """Stop the process of a rank while it is in a phase, from its second step on (`start`: at once)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and job.poll() is None:
        process = rank_processes(job).get(rank)
        while process is not None and time.monotonic() < deadline and process.is_running():
            beat = beat_of(process, rank)
            if beat.pid and beat.phase == phase and (phase == "start" or beat.step > 1):
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.1)
                if beat_of(process, rank).phase == phase:
                    return
                process.send_signal(signal.SIGCONT)  # the phase ended before the signal arrived
        time.sleep(0.02)
    raise AssertionError(f"rank {rank} was not found in phase {phase} within {seconds:g} s (exit code {job.poll()})")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_a_stopped_rank_is_named_with_machine_and_phase_within_the_limit(tmp_path: Path, phase: str, rank: int) -> None:
    limit = START_LIMIT if phase == "start" else 60.0 if phase == OUTSIDE else LIMIT
    limits = ", ".join(f"{name}: {LIMIT:g}" for name in PHASES if name not in ("start", OUTSIDE))
    keys = (f"guard.phase_limits={{start: {START_LIMIT:g}, {limits}}}", f"run.dir={tmp_path / 'run'}")
    with running_job((*KEYS, *keys), tmp_path / "log") as job:
        stop_in_phase(job, rank, phase, seconds=300.0)
        begin = time.monotonic()
        code = job.wait(limit + 60)
        seconds = time.monotonic() - begin
    shown = (tmp_path / "log.err").read_text()
    assert code == 1, shown[-2000:]
    named = rf"rank {rank} \(process \d+ on {re.escape(socket.gethostname())}\): no progress for \d+ s in phase {phase}"
    assert re.search(named + r".*its process is stopped \(SIGSTOP", shown), shown[-3000:]
    assert f"rank {rank} makes no progress; waiting for it: {1 - rank}" in shown.splitlines()[-1]
    assert seconds < limit + REPORT_SECONDS

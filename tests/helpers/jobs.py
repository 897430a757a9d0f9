"""Training jobs started as a user does, with `launch/train.sh`, and readers of their run folders."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from grpo_mega.cli.chaos_run import depends_on_time, kill_with_children
from grpo_mega.observe.rollout_files.reader import read_rows
from grpo_mega.observe.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "launch" / "train.sh"
QUICKSTART = "configs/quickstart.yaml"

# A step takes well under a second: 8 prompts x 4 rollouts, no evaluation.
SMALL = (
    QUICKSTART,
    "data.prompts_per_step=8",
    "sampling.group_size=4",
    "train.minibatches_per_epoch=2",
    "data.eval=null",
)

# Variables of other ranks that a test must not inherit.
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "NNODES", "NODE_RANK", "TORCHELASTIC_")


@dataclass(frozen=True)
class FinishedCommand:
    """Exit code, output and duration of a finished command."""

    code: int
    stdout: str
    stderr: str
    seconds: float


def clean_environment() -> dict[str, str]:
    """Return the environment of this process without the variables of ranks and launchers."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    own.setdefault("OMP_NUM_THREADS", "1")
    return own


@contextmanager
def running_job(arguments: Sequence[str], output: Path, env: Mapping[str, str] | None = None) -> Iterator[psutil.Popen]:
    """Run `launch/train.sh ARGUMENTS` in the checkout's folder, where the base model is cached; end it on exit.

    The output goes to `output`.out and `output`.err.
    """
    with output.with_suffix(".out").open("wb") as stdout, output.with_suffix(".err").open("wb") as stderr:
        process = psutil.Popen(
            [str(TRAIN), *arguments],
            cwd=REPOSITORY,
            env={**clean_environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            kill_with_children(process)


def run_job(
    *arguments: str, output: Path, env: Mapping[str, str] | None = None, timeout_seconds: float = 300.0
) -> FinishedCommand:
    """Run a job to its end. Raises subprocess.TimeoutExpired after the timeout; no process is left running."""
    begin = time.monotonic()
    with running_job(arguments, output, env) as process:
        code = int(process.wait(timeout_seconds))
    texts = [output.with_suffix(suffix).read_text(errors="replace") for suffix in (".out", ".err")]
    return FinishedCommand(code, *texts, time.monotonic() - begin)


def run_job_successfully(*arguments: str, output: Path, timeout_seconds: float = 300.0) -> FinishedCommand:
    """Run a job and assert exit code 0; the error shows its last lines."""
    ended = run_job(*arguments, output=output, timeout_seconds=timeout_seconds)
    assert ended.code == 0, (
        f"exit code {ended.code} of {' '.join(arguments)}\n{ended.stdout[-1000:]}{ended.stderr[-4000:]}"
    )
    return ended


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of steps or rollouts; the evaluations at both ends of metrics.jsonl are left out."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "evaluation" not in line]


def rollouts_of(run: Path, step: int) -> list[dict[str, Any]]:
    return read_rows(RunFolder(run).rollouts_of(step))


def without_times(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of metrics.jsonl without the values that depend on time."""
    return {name: value for name, value in line.items() if not depends_on_time(name)}


def kill_when_complete(run: Path, step: int, output: Path, arguments: Sequence[str]) -> None:
    """Start the run, and kill all of its processes after the checkpoint of `step`, in the next step."""
    complete = run / "checkpoints" / f"step_{step:06d}" / "complete"
    with running_job([*arguments, f"run.dir={run}"], output) as process:
        deadline = time.monotonic() + 300
        while not complete.exists():
            assert process.poll() is None, output.with_suffix(".err").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        members = process.children(recursive=True)
        kill_with_children(process)
    assert [member for member in members if member.is_running() and member.status() != psutil.STATUS_ZOMBIE] == []


def wait_for_step(run: Path, step: int) -> None:
    """Wait until `metrics.jsonl` of a run folder has this step."""
    end = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len(read_lines(run / "metrics.jsonl")) < step:
        assert time.monotonic() < end, f"step {step} was not reached"
        time.sleep(0.05)

"""A run that is killed after a local save continues from it bit by bit; without one, from the run folder."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.helpers.jobs import (
    SMALL,
    kill_with_children,
    read_json,
    read_lines,
    rollouts_of,
    run_job_successfully,
    running_job,
    without_times,
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
STEPS, LOCAL_STEP, FORK_STEP = 6, 3, 2
KEYS = (*SMALL, "run.world_size=2", f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.export_hf=false")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run without local checkpoints."""
    root = tmp_path_factory.mktemp("plain")
    run_job_successfully(*KEYS, "checkpoint.keep=3", f"run.dir={root / 'run'}", output=root / "log")
    return root / "run"


def kill_after_local_step(arguments: tuple[str, ...], local: Path, output: Path) -> None:
    """Start a run and kill all of its processes once the local checkpoint of step LOCAL_STEP is complete."""
    with running_job(arguments, output) as job:
        deadline = time.monotonic() + 300
        while not list(local.glob(f"*/*/step_{LOCAL_STEP:06d}/complete")):
            assert job.poll() is None, output.with_suffix(".err").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        kill_with_children(job)
    assert steps_in(local) == [f"step_{LOCAL_STEP:06d}"]  # the one before was deleted


def assert_equal(run: Path, expected: Path, first: int) -> None:
    """Compare the results of two runs from step `first` on."""
    digests = {read_json(folder / "summary.json")["policy_digest"] for folder in (run, expected)}
    assert len(digests) == 1
    ours, theirs = ([without_times(x) for x in read_lines(folder / "metrics.jsonl")] for folder in (run, expected))
    assert ours == theirs[first - 1 :]
    for step in range(first, STEPS + 1):
        assert rollouts_of(run, step) == rollouts_of(expected, step)


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("step_*") if path.suffix == "")


def test_a_killed_run_continues_from_its_local_checkpoint_and_without_it_from_the_run_folder(
    plain: Path, tmp_path: Path
) -> None:
    local, run = tmp_path / "local", tmp_path / "run"
    keys = (*KEYS, "checkpoint.local_every=1", f"checkpoint.local_dir={local}", f"run.dir={run}")
    kill_after_local_step(keys, local, tmp_path / "killed")
    assert steps_in(run / "checkpoints") == ["step_000002"]
    shutil.copytree(run, tmp_path / "kept")
    continued = run_job_successfully(*keys, output=tmp_path / "continued")
    assert f"the local checkpoint of step {LOCAL_STEP} was copied to " in continued.stderr
    assert f"step {LOCAL_STEP} of {STEPS} is complete, {STEPS - LOCAL_STEP} remain" in continued.stderr
    assert steps_in(local) == []  # newer ones are in the run folder

    run.rename(tmp_path / "done")
    (tmp_path / "kept").rename(run)
    lost = run_job_successfully(*keys, output=tmp_path / "lost")
    assert f"no machine holds a local checkpoint after step 2 (checkpoint.local_dir={local})" in lost.stderr
    assert f"step 2 of {STEPS} is complete, {STEPS - 2} remain" in lost.stderr
    for each in (tmp_path / "done", run):
        assert_equal(each, plain, first=1)


def test_a_killed_fork_continues_from_its_local_checkpoint_and_not_from_the_checkpoint_that_it_started_from(
    plain: Path, tmp_path: Path
) -> None:
    local, run, start = tmp_path / "local", tmp_path / "run", plain / "checkpoints" / f"step_{FORK_STEP:06d}"
    keys = (*KEYS, "checkpoint.local_every=1", f"checkpoint.local_dir={local}", f"run.dir={run}")
    keys = (*keys, f"checkpoint.every={STEPS}", f"checkpoint.resume={start}")
    kill_after_local_step(keys, local, tmp_path / "killed")
    assert steps_in(run / "checkpoints") == []
    continued = run_job_successfully(*keys, output=tmp_path / "continued")
    assert f"the local checkpoint of step {LOCAL_STEP} was copied to " in continued.stderr
    assert f"step {LOCAL_STEP} of {STEPS} is complete, {STEPS - LOCAL_STEP} remain" in continued.stderr
    assert_equal(run, plain, first=FORK_STEP + 1)

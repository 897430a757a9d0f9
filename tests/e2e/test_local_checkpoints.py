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
STEPS, LOCAL_STEP = 6, 3
KEYS = (*SMALL, "run.world_size=2", f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.export_hf=false")


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("step_*") if path.suffix == "")


def test_a_killed_run_continues_from_its_local_checkpoint_and_without_it_from_the_run_folder(tmp_path: Path) -> None:
    local = tmp_path / "local"
    keys = (*KEYS, "checkpoint.local_every=1", f"checkpoint.local_dir={local}")
    run = tmp_path / "run"
    with running_job((*keys, f"run.dir={run}"), tmp_path / "killed") as job:
        deadline = time.monotonic() + 300
        while not list(local.glob(f"*/*/step_{LOCAL_STEP:06d}/complete")):
            assert job.poll() is None, (tmp_path / "killed.err").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        kill_with_children(job)
    assert steps_in(local) == [f"step_{LOCAL_STEP:06d}"]  # the one before was deleted
    assert steps_in(run / "checkpoints") == ["step_000002"]
    shutil.copytree(run, tmp_path / "kept")
    continued = run_job_successfully(*keys, f"run.dir={run}", output=tmp_path / "continued")
    assert f"the local checkpoint of step {LOCAL_STEP} was copied to " in continued.stderr
    assert f"step {LOCAL_STEP} of {STEPS} is complete, {STEPS - LOCAL_STEP} remain" in continued.stderr
    assert steps_in(local) == []  # newer ones are in the run folder

    run_job_successfully(*KEYS, f"run.dir={tmp_path / 'plain'}", output=tmp_path / "plain_log")
    run.rename(tmp_path / "done")
    (tmp_path / "kept").rename(run)
    lost = run_job_successfully(*keys, f"run.dir={run}", output=tmp_path / "lost")
    assert f"no machine holds a local checkpoint after step 2 (checkpoint.local_dir={local})" in lost.stderr
    assert f"step 2 of {STEPS} is complete, {STEPS - 2} remain" in lost.stderr
    for each in (tmp_path / "done", run):
        digests = {read_json(folder / "summary.json")["policy_digest"] for folder in (each, tmp_path / "plain")}
        assert len(digests) == 1
        ours, theirs = (
            [without_times(x) for x in read_lines(folder / "metrics.jsonl")] for folder in (each, tmp_path / "plain")
        )
        assert ours == theirs
        for step in range(1, STEPS + 1):
            assert rollouts_of(each, step) == rollouts_of(tmp_path / "plain", step)

"""Run folders that cannot be used, two jobs on one folder, and a clock that jumps: one message and no traceback."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.jobs import (
    REPOSITORY,
    SMALL,
    read_json,
    read_lines,
    rollouts_of,
    run_job,
    run_job_successfully,
    running_job,
    without_times,
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
KEYS = (*SMALL, "checkpoint.every=1", "checkpoint.export_hf=false")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    run_job_successfully(*KEYS, "train.steps=2", f"run.dir={root / 'run'}", output=root / "log")
    return root / "run"


def replace_by_file(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints)
    checkpoints.touch()


def replace_by_loop(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints)
    checkpoints.symlink_to(checkpoints)


@pytest.mark.parametrize("damage", [replace_by_file, replace_by_loop])
def test_a_folder_of_checkpoints_that_is_not_one_is_named(
    two_steps: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_steps, run)
    damage(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    ended = run_job(*KEYS, "train.steps=3", f"run.dir={run}", output=tmp_path / "log")
    assert_rejected(ended.code, ended.stdout + ended.stderr)
    assert f"error: {run / 'checkpoints'}: cannot be read (" in ended.stderr
    assert "restore the folder, or start again with run.overwrite=true" in ended.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


def assert_rejected(code: int, shown: str) -> None:
    assert code == 2, shown
    assert "Traceback" not in shown
    assert shown.count("error: ") == 1, shown


def mounted(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system in memory; the test is skipped without the rights of root."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs the rights of root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def disk(two_steps: Path, tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the run of two steps and one checkpoint more."""
    sizes = {path: path.stat().st_size for path in two_steps.rglob("*") if path.is_file()}
    checkpoint = sum(
        size for path, size in sizes.items() if "step_000002" in path.parts and "checkpoints" in path.parts
    )
    yield from mounted(tmp_path / "disk", str(sum(sizes.values()) + checkpoint + 2**20))


def test_a_read_only_run_folder_is_named(two_steps: Path, disk: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    ended = run_job(*KEYS, "train.steps=3", f"run.dir={disk / 'run'}", output=tmp_path / "log")
    assert_rejected(ended.code, ended.stdout + ended.stderr)
    assert f"run.dir={disk / 'run'} cannot be written: Read-only file system; name a writable folder" in ended.stderr


def test_a_full_disk_ends_the_run_with_the_bytes_and_it_continues_when_there_is_space(
    two_steps: Path, disk: Path, tmp_path: Path
) -> None:
    keys = (*KEYS, "checkpoint.keep=9", "train.steps=5", f"run.dir={disk / 'run'}")
    shutil.copytree(two_steps, disk / "run")
    ended = run_job(*keys, output=tmp_path / "full")
    shown = ended.stdout + ended.stderr
    assert ended.code == 1, shown
    assert "Traceback" not in shown
    assert " cannot be written: its file system has " in shown
    assert "earlier checkpoints are unchanged: after freeing space, the same command continues from the newest" in shown
    whole = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    assert whole[:2] == ["step_000001", "step_000002"]
    assert not any(name.endswith(".tmp") for name in whole)
    subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
    run_job_successfully(*keys, output=tmp_path / "rest")
    assert [line["step"] for line in read_lines(disk / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_second_job_on_a_run_folder_is_rejected_and_the_first_is_not_disturbed(
    two_steps: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    keys = (*KEYS, "train.steps=12", f"run.dir={run}")
    with running_job(keys, tmp_path / "first") as first:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ended = run_job(*keys, output=tmp_path / "second")
        assert_rejected(ended.code, ended.stdout + ended.stderr)
        assert f"run.dir={run} is in use by process " in ended.stderr
        assert "wait for it, end it, or name another folder" in ended.stderr
        assert first.wait(200) == 0, (tmp_path / "first.err").read_text()[-3000:]
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, 13))
    for step in (1, 2):
        assert rollouts_of(run, step) == rollouts_of(two_steps, step)


JUMPING_CLOCK = '''
"""Makes the wall clock of Python jump by up to 30 days in both directions from call to call, in every process."""
import itertools, time
_jumps = itertools.cycle((0.0, 2592000.0, -2592000.0, 3600.0, -3600.0))
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + next(_jumps)
time.time_ns = lambda: _time_ns() + int(next(_jumps)) * 10**9
'''


def test_a_clock_that_jumps_changes_no_result_and_causes_no_stall(two_steps: Path, tmp_path: Path) -> None:
    """Also with limits of a few seconds, saves by time, and a restart of the job: they use monotonic clocks."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(JUMPING_CLOCK)
    env = {"PYTHONPATH": f"{tmp_path / 'clock'}:{REPOSITORY}"}
    limits = "{rollout: 30, reward: 30, log_probs: 30, train: 30, sync: 30, checkpoint: 30}"
    keys = (
        *(key for key in KEYS if key != "checkpoint.every=1"),
        f"guard.phase_limits={limits}",
        "guard.timeout_seconds=60",
        "run.world_size=2",
        f"run.dir={tmp_path / 'run'}",
    )
    by_time = "checkpoint.every_minutes=600"  # a jump of an hour or a month must not make one due
    ended = run_job(*keys, by_time, "train.steps=3", "checkpoint.keep=9", output=tmp_path / "log", env=env)
    assert ended.code == 0, ended.stderr[-3000:]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step_000003"]
    ended = run_job(*keys, "train.steps=4", "checkpoint.every_minutes=0.0001", output=tmp_path / "rest", env=env)
    assert ended.code == 0, ended.stderr[-3000:]
    assert "stalled" not in (tmp_path / "log.err").read_text() + ended.stderr
    run_job_successfully(*keys[:-1], "train.steps=4", f"run.dir={tmp_path / 'plain'}", output=tmp_path / "plain_log")
    ours, theirs = (
        [without_times(line) for line in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("run", "plain")
    )
    assert ours == theirs
    digests = {read_json(tmp_path / name / "summary.json")["policy_digest"] for name in ("run", "plain")}
    assert len(digests) == 1

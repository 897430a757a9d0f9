"""A run with a damaged checkpoint continues from the one before; a fork names its origin and what remains."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.jobs import SMALL, read_json, read_lines, run_job, run_job_successfully, without_times

ARGUMENTS = (*SMALL, "checkpoint.every=1", "checkpoint.keep=3", "checkpoint.export_hf=false")


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("three")
    run_job_successfully(*ARGUMENTS, "train.steps=3", f"run.dir={root / 'run'}", output=root / "log")
    return root / "run"


def shard_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:06d}" / "__0_0.distcp"


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_run_continues_from_the_checkpoint_before_a_damaged_one_and_repeats_its_steps(
    three_steps: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(three_steps, run)
    flip_bit(shard_of(run, 3))
    shard_of(run, 2).unlink()
    ended = run_job_successfully(*ARGUMENTS, "train.steps=4", f"run.dir={run}", output=tmp_path / "log")
    for words in (
        f"{shard_of(run, 3)}: its digest differs",
        f"{shard_of(run, 2)}: is missing",
        "step_000001: step 1 of 4 is complete, 3 remain",
    ):
        assert words in ended.stdout + ended.stderr
    assert sorted(path.name for path in (run / "checkpoints" / "damaged").iterdir()) == ["step_000002", "step_000003"]
    before, after = (read_lines(folder / "metrics.jsonl") for folder in (three_steps, run))
    assert [line["step"] for line in after] == [1, 2, 3, 4]
    assert [without_times(line) for line in after[:3]] == [without_times(line) for line in before]


@pytest.mark.long  # tests/parallel/test_damaged_checkpoints.py has the same without a command
def test_a_run_without_a_whole_checkpoint_is_an_error_that_names_each(three_steps: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(three_steps, run)
    for step in (1, 2, 3):
        flip_bit(shard_of(run, step))
    ended = run_job(*ARGUMENTS, "train.steps=4", f"run.dir={run}", output=tmp_path / "log")
    assert ended.code == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    for step in (1, 2, 3):
        assert f"{shard_of(run, step)}: its digest differs" in ended.stderr
    assert "run.overwrite=true" in ended.stderr
    assert len(read_lines(run / "metrics.jsonl")) == 3


def test_a_fork_names_its_origin_and_reports_the_accuracy_at_its_start(three_steps: Path, tmp_path: Path) -> None:
    origin = three_steps / "checkpoints" / "step_000003"
    arguments = (*ARGUMENTS, f"checkpoint.resume={origin}", f"run.dir={tmp_path / 'fork'}")
    more = ("train.steps=4", "data.eval=arithmetic:heldout", "evaluation.max_prompts=8", "evaluation.k=1")
    ended = run_job_successfully(*arguments, *more, output=tmp_path / "log")
    assert f"starting a new run from {origin}: step 3 of 4 is complete, 1 remain" in ended.stdout + ended.stderr
    assert [line["step"] for line in read_lines(tmp_path / "fork" / "metrics.jsonl")] == [4]
    assert read_json(tmp_path / "fork" / "summary.json")["eval_before"]["num_prompts"] == 8


@pytest.mark.long  # test_config_changes.py and test_learning_rate.py of tests/unit/ have the parts
def test_a_changed_learning_rate_is_used_from_the_next_step_on_and_reported(three_steps: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(three_steps, run)
    changes = ("optimizer.lr=0.5e-3", "train.max_tokens_per_microbatch=4096", "reward.workers=2")
    ended = run_job_successfully(*ARGUMENTS, *changes, "train.steps=4", f"run.dir={run}", output=tmp_path / "log")
    assert "from step 4 on: optimizer.lr=0.0005" in ended.stdout + ended.stderr
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "config_changes" in line] == [4]
    (change,) = lines[-1]["config_changes"]
    assert change.startswith("optimizer.lr: ")
    assert change.endswith(" -> 0.0005")
    assert lines[-1]["train/learning_rate"] > 2 * lines[-2]["train/learning_rate"]
    assert any(b"config_changes" in file.read_bytes() for file in (run / "tensorboard").iterdir())

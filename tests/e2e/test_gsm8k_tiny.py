"""Training on the real GSM8K file learns the format of the answers; a missing file is an error with a remedy."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.helpers.jobs import read_json, read_lines, run_job, run_job_successfully

CONFIG = "configs/gsm8k-tiny.yaml"


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_ten_steps_raise_the_format_reward_by_0_10(gsm8k_dir: Path, tmp_path: Path, seed: int) -> None:
    """Compare the mean of the last three steps with the first three; the base is pre-trained unless it is cached."""
    arguments = (CONFIG, f"data.train={gsm8k_dir / 'train.jsonl'}", f"run.seed={seed}", f"run.dir={tmp_path / 'run'}")
    run_job_successfully(*arguments, output=tmp_path / "log", timeout_seconds=580)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    rewards = [line["reward/component/format"] for line in lines]
    assert len(rewards) == 10
    assert statistics.fmean(rewards[-3:]) >= statistics.fmean(rewards[:3]) + 0.10
    assert max(line["train/mismatch_max"] for line in lines) <= 1e-4
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["status"] == "done"
    assert summary["eval_before"] is None  # the config has no held-out split
    assert summary["eval_after"] is None


def test_the_error_of_a_missing_gsm8k_file_has_its_source_and_path(tmp_path: Path) -> None:
    missing = tmp_path / "gsm8k" / "train.jsonl"
    ended = run_job(CONFIG, f"data.train={missing}", f"run.dir={tmp_path / 'run'}", output=tmp_path / "log")
    assert ended.code == 2
    (message,) = [line for line in ended.stderr.splitlines() if "train.jsonl" in line]
    assert f"data.train={missing}" in message
    assert "put GSM8K's train.jsonl there" in message
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()

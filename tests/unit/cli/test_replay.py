"""Inputs of `grpo-mega replay` in a run folder, its errors, and the first stage that differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from grpo_mega.cli.replay import Stage, lines_of, main
from grpo_mega.cli.replay_inputs import config_before, find_inputs
from grpo_mega.cli.replay_worker import _compared
from grpo_mega.types import UserError

CONFIG = {
    "model": {"base": {"task": "arithmetic"}},
    "data": {"train": "arithmetic:train", "prompts_per_step": 2},
    "reward": {"terms": [{"name": "exact"}]},
    "train": {"steps": 9},
    "checkpoint": {"resume": "auto"},
    "run": {"world_size": 1},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 5 steps with checkpoints of steps 2 and 4."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "train/loss": 0.1}}\n' for n in range(1, 6)))
    for step in range(1, 6):
        (tmp_path / f"rollouts/step_{step:06d}").mkdir(parents=True)
    for step in (2, 4):
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step_{step:06d}/complete").touch()
    return tmp_path


def error_of(run: Path, step: int) -> str:
    with pytest.raises(UserError) as caught:
        find_inputs(run, step, None)
    return str(caught.value)


def test_a_folder_without_a_run_and_a_step_that_was_not_made_are_named(run: Path, tmp_path: Path) -> None:
    assert error_of(tmp_path / "none", 1).startswith(f"RUN_DIR={tmp_path / 'none'} has no config.yaml")
    assert "--step=6 is not in metrics.jsonl" in error_of(run, 6)
    assert "complete steps: 1 to 5" in error_of(run, 6)


def test_the_rollouts_of_each_step_after_the_checkpoint_are_needed(run: Path) -> None:
    (run / "rollouts/step_000003").rmdir()
    message = error_of(run, 4)  # from the checkpoint of step 2
    assert "--step=4 needs the rollouts of step 3" in message
    assert "observe.rollouts=all" in message


def test_a_key_that_changed_between_the_checkpoint_and_the_step_is_named(run: Path) -> None:
    line = {"after_step": 3, "key": "optimizer.lr", "before": "0.001", "now": "0.002"}
    (run / "config_changes.jsonl").write_text(json.dumps(line) + "\n")
    assert "--step=4: optimizer.lr changed after step 3" in error_of(run, 4)
    assert "use a step up to 3" in error_of(run, 4)


def test_a_fork_without_its_origin_is_named(run: Path) -> None:
    values = CONFIG | {"checkpoint": {"resume": str(run / "gone/step_000001")}}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert "branched from checkpoint.resume=" in error_of(run, 2)


def test_the_config_before_a_change_has_the_values_of_that_time() -> None:
    changes = [
        {"after_step": 2, "key": "optimizer.lr", "before": "0.001", "now": "0.002"},
        {"after_step": 3, "key": "optimizer.lr", "before": "0.002", "now": "0.003"},
        {"after_step": 3, "key": "guard.max_mismatch", "before": "unset", "now": "0.1"},
    ]
    now = {"optimizer": {"lr": 0.003}, "guard": {"max_mismatch": 0.1}}
    assert config_before(now, changes) == {"optimizer": {"lr": 0.001}, "guard": {}}
    assert config_before(now, changes[1:]) == {"optimizer": {"lr": 0.002}, "guard": {}}
    assert now["optimizer"]["lr"] == 0.003


def test_wrong_input_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--step", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: RUN_DIR=")
    assert main([str(tmp_path), "--step", "1", "--layout", "xp=2"]) == 2
    assert "--layouts: 'xp=2'" in capsys.readouterr().err


def test_the_size_of_a_difference_is_relative_and_nan_is_a_difference() -> None:
    ones = np.ones(4)
    assert _compared("loss", ones, ones, "")["difference"] == 0
    assert _compared("loss", np.array([np.nan]), np.array([np.nan]), "")["difference"] == 0
    assert _compared("loss", np.array([1, 1, 1, 2.0]), 4 * ones, "")["difference"] == pytest.approx(0.75)
    assert _compared("loss", np.array([np.nan]), np.ones(1), "")["difference"] > 1e9
    assert _compared("log-probs", np.zeros(0), np.zeros(0), "")["difference"] is None


@pytest.mark.parametrize(
    ("difference", "verdict"), [(None, "not recorded"), (0.0, "equal"), (1e-5, "within rounding"), (1e-3, "differs")]
)
def test_a_stage_has_one_verdict(difference: float | None, verdict: str) -> None:
    assert Stage("loss", difference, "").verdict(1e-4) == verdict


def test_the_text_names_the_first_stage_that_differs() -> None:
    stages = [{"name": "loss", "verdict": "differs", "text": "train/loss=1.0, recorded 2.0"}]
    found = {"step": 3, "run": "runs/a", "from": "checkpoints/step_000002", "world_size": 2, "layout": "of the run"}
    lines = lines_of(found | {"stages": stages, "fp8": [], "first_difference": "loss"})
    assert lines[0] == "step 3 of runs/a from checkpoints/step_000002: 2 rank(s), layout of the run"
    assert lines[-1] == "the first stage that differs: loss"

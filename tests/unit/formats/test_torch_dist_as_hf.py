"""Which folder says what model a checkpoint is of."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.formats.torch_dist_as_hf import find_base
from grpo_mega.types import UserError


def folder_with_config(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints" / "step_000006"
    folder.mkdir(parents=True)
    return folder


def test_a_converted_checkpoint_has_its_model_beside_it(tmp_path: Path) -> None:
    beside = folder_with_config(tmp_path / "out" / "hf")
    assert find_base(tmp_path / "out", tmp_path / "out" / "release") == beside


def test_a_run_s_checkpoint_is_of_the_model_that_it_was_started_from(tmp_path: Path, checkpoint: Path) -> None:
    model = folder_with_config(tmp_path / "model")
    folder_with_config(tmp_path / "run" / "hf")
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{path: {model}}}")
    assert find_base(checkpoint, checkpoint) == model


def test_a_run_that_taught_its_own_base_has_it_in_what_it_exported(tmp_path: Path, checkpoint: Path) -> None:
    exported = folder_with_config(tmp_path / "run" / "hf")
    (tmp_path / "run" / "config.yaml").write_text("model: {base: {task: arithmetic}}")
    assert find_base(checkpoint, checkpoint) == exported


def test_without_any_the_user_is_asked(checkpoint: Path) -> None:
    (checkpoint.parent.parent / "config.yaml").write_text("model: {base: {task: arithmetic}}")
    with pytest.raises(UserError, match="does not say which model it is; set --base to its Hugging Face folder"):
        find_base(checkpoint, checkpoint)

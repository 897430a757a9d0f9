"""The folder with the Hugging Face config of a checkpoint is found."""

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


def test_a_converted_checkpoint_uses_the_model_folder_beside_it(tmp_path: Path) -> None:
    beside = folder_with_config(tmp_path / "out" / "hf")
    assert find_base(tmp_path / "out", tmp_path / "out" / "release") == beside


def test_a_checkpoint_of_a_run_uses_the_model_of_the_run(tmp_path: Path, checkpoint: Path) -> None:
    model = folder_with_config(tmp_path / "model")
    folder_with_config(tmp_path / "run" / "hf")
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{path: {model}}}")
    assert find_base(checkpoint, checkpoint) == model


def test_a_run_with_a_pre_trained_tiny_base_uses_its_exported_model(tmp_path: Path, checkpoint: Path) -> None:
    exported = folder_with_config(tmp_path / "run" / "hf")
    (tmp_path / "run" / "config.yaml").write_text("model: {base: {task: arithmetic}}")
    assert find_base(checkpoint, checkpoint) == exported


def test_without_a_model_folder_the_error_requests_base(checkpoint: Path) -> None:
    (checkpoint.parent.parent / "config.yaml").write_text("model: {base: {task: arithmetic}}")
    with pytest.raises(UserError, match=r"set --base .*Hugging Face folder"):
        find_base(checkpoint, checkpoint)

"""Old checkpoints disappear at once, are deleted by a thread, and a killed deletion is finished by the next save."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.checkpoint import removal
from grpo_mega.checkpoint.removal import CheckpointRemoval


def _checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step_{step:06d}"
    path.mkdir()
    (path / "complete").write_text("x")
    return path


def test_a_folder_is_invisible_at_once_and_deleted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, delete = threading.Event(), shutil.rmtree

    def wait_and_delete(path: Path) -> None:
        go_on.wait(30)
        delete(path)

    monkeypatch.setattr(removal.shutil, "rmtree", wait_and_delete)
    deletions = CheckpointRemoval()
    deletions.start(tmp_path, [_checkpoint(tmp_path, 1), _checkpoint(tmp_path, 2)])
    assert not list(tmp_path.glob("step_*"))
    assert len(list(tmp_path.iterdir())) == 2, "deleted too early"
    assert deletions.is_running
    deletions.wait(0.01)
    assert deletions.is_running
    go_on.set()
    deletions.wait(30)
    assert not deletions.is_running
    assert not list(tmp_path.iterdir())


def test_what_a_killed_deletion_left_is_deleted_with_the_next_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(removal.shutil, "rmtree", lambda path: None)
        deletions = CheckpointRemoval()
        deletions.start(tmp_path, [_checkpoint(tmp_path, 1)])
        deletions.wait(30)
    kept = _checkpoint(tmp_path, 2)
    (tmp_path / "step_000003.tmp").mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    deletions.start(tmp_path, [_checkpoint(tmp_path, 1)])  # the name of the hidden folder is taken
    deletions.wait(30)
    assert sorted(tmp_path.iterdir()) == [kept, tmp_path / "step_000003.tmp"]


def test_of_a_symbolic_link_only_the_link_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    elsewhere = _checkpoint(tmp_path / "archive", 1)
    link = tmp_path / "step_000001"
    link.symlink_to(elsewhere)
    deletions = CheckpointRemoval()
    deletions.start(tmp_path, [link])
    deletions.wait(30)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
    assert (elsewhere / "complete").exists()


def test_a_failed_deletion_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path) -> Any:
        raise OSError("read-only file system")

    monkeypatch.setattr(removal.shutil, "rmtree", fail)
    deletions = CheckpointRemoval()
    for _ in range(2):  # the second finds the folder of the first
        deletions.start(tmp_path, [_checkpoint(tmp_path, 7)])
        deletions.wait(30)
    assert "step_000007" in caplog.text
    assert "read-only file system" in caplog.text

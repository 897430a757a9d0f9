"""Old checkpoints disappear at once, are deleted by a thread, and a killed deletion is finished by the next save."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.checkpoint import removal
from grpo_mega.checkpoint.removal import CheckpointRemoval, delete_left_over


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
    deletions.start([_checkpoint(tmp_path, 1), _checkpoint(tmp_path, 2)])
    assert not list(tmp_path.glob("step_*"))
    assert len(list(tmp_path.iterdir())) == 2, "deleted before it was asked to go on"
    go_on.set()
    deletions.wait()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_deletion_left_is_deleted_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(removal.shutil, "rmtree", lambda path: None)
        deletions = CheckpointRemoval()
        deletions.start([_checkpoint(tmp_path, 1)])
        deletions.wait()
    kept = _checkpoint(tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 2
    delete_left_over(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_a_failed_deletion_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path) -> Any:
        raise OSError("read-only file system")

    monkeypatch.setattr(removal.shutil, "rmtree", fail)
    deletions = CheckpointRemoval()
    deletions.start([_checkpoint(tmp_path, 7)])
    deletions.wait()
    assert "step_000007" in caplog.text
    assert "read-only file system" in caplog.text

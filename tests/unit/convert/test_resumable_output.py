"""The resumable output folder: it belongs to one conversion, keeps complete files, and becomes OUT when complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.convert.resumable_output import Workspace
from grpo_mega.types import UserError


def file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_result_appears_by_one_rename_and_no_other_file_remains(tmp_path: Path) -> None:
    with Workspace(tmp_path / "deep" / "out", {}) as workspace:
        assert file_names(tmp_path) == []
        workspace.begin("x")
        (workspace.result / "a").write_text("a")
        workspace.record("a").write_text("{}")
        assert workspace.num_bytes() == 1
        assert not workspace.out.exists()
        workspace.publish()
    assert file_names(tmp_path) == ["deep", "deep/out", "deep/out/a"]


def test_the_same_conversion_is_continued_and_another_one_is_deleted(tmp_path: Path) -> None:
    for identity, kept in (("x", []), ("x", ["a"]), ("y", [])):
        with Workspace(tmp_path / "out", {}) as workspace:
            workspace.begin(identity)
            assert file_names(workspace.result) == kept
            (workspace.result / "a").write_text("a")


def test_after_an_error_only_complete_files_are_kept(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", {}) as workspace:
        workspace.begin("x")
        (workspace.result / "b.tmp").write_text("half")
        workspace.abandon()
        assert file_names(tmp_path) == []
        workspace.begin("x")
        for path in (workspace.result / "a", workspace.result / "b.tmp", workspace.record("a")):
            path.write_text("{}")
        workspace.abandon()
        assert file_names(workspace.result) == ["a"]


def test_a_folder_of_that_name_that_is_not_a_workspace_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out\.partial: is needed as the workspace .*notes\.txt"):
        Workspace(tmp_path / "out", {})
    assert file_names(tmp_path) == ["out.partial", "out.partial/notes.txt"]


def test_two_conversions_cannot_use_one_workspace(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", {}) as first, Workspace(tmp_path / "out", {}) as second:
        first.begin("x")
        (first.result / "a").write_text("a")
        with pytest.raises(UserError, match="another process uses it"):
            second.begin("y")
        assert file_names(first.result) == ["a"]


@pytest.mark.parametrize("inside", [".", "deep/er", "link"])
def test_an_output_inside_an_input_is_rejected(tmp_path: Path, inside: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "in" / "elsewhere")
    with pytest.raises(UserError, match=r"is HF_DIR=.*/in or inside it"):
        Workspace(tmp_path / "in" / inside, {"HF_DIR": tmp_path / "in"})
    Workspace(tmp_path / "into", {"HF_DIR": tmp_path / "in"})


def test_a_nonempty_output_is_rejected_and_an_empty_one_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Workspace(tmp_path / "out", {}) as workspace:
        workspace.begin("x")
        (workspace.result / "a").write_text("a")
        workspace.publish()
    for taken in ("out", "out/a"):
        with pytest.raises(UserError, match="exists and is not empty"):
            Workspace(tmp_path / taken, {})

"""`grpo-mega report`: files, messages and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_mega.cli.report import main
from tests.helpers.reported_runs import write_run


def test_the_page_is_written_into_the_run_folder_and_the_summary_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    assert main([str(run), "--json"]) == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Done: 6 steps in 12.0s."
    assert json.loads(lines[-1])["page"] == str(run / "report.html")


def test_two_runs_and_another_file(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    out = tmp_path / "page.html"
    assert main([str(first), str(second), "--out", str(out)]) == 0
    assert "a against b" in out.read_text()
    assert not (first / "report.html").exists()


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_folder_without_a_run_is_exit_code_2(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / folder)]) == 2
    assert capsys.readouterr().err.startswith(f"error: RUN_DIR={tmp_path / folder}")


def test_a_page_that_cannot_be_written_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_run(tmp_path / "run")), "--out", str(tmp_path / "no" / "such" / "page.html")]) == 2
    assert "--out=" in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_first_checkpoint_has_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    (run / "summary.json").unlink()
    assert main([str(run)]) == 0
    assert "has no summary yet" in capsys.readouterr().out

"""A file that cannot be written is an error before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.cli import plan, plan_sync


@pytest.mark.parametrize(
    ("main", "option"), [(plan.main, "--html"), (plan_sync.main, "--out")], ids=["plan", "plan_sync"]
)
@pytest.mark.parametrize(
    ("name", "rule"), [("missing/x", "does not exist"), ("", "is a folder")], ids=["no folder", "folder"]
)
def test_a_file_that_cannot_be_written_is_exit_code_2(
    main: object, option: str, name: str, rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    assert callable(main)
    assert main(["quickstart", "run.world_size=1", option, str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option}={path}")
    assert rule in error
    assert error.count("\n") == 1

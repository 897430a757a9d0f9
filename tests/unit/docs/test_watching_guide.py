"""docs/watching.md: its commands run on folders of runs."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from grpo_mega.cli import report, watch
from tests.helpers.guides import shell_blocks
from tests.helpers.reported_runs import write_run

TOOLS = {"report": report.main, "watch": watch.main}
COMMANDS = [
    shlex.split(line, comments=True) for block in shell_blocks("watching.md") for line in block.splitlines() if line
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_ends_with_0(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("quickstart", "first", "second"):
        write_run(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    program, tool, *arguments = command
    assert program == "grpo-mega"
    assert TOOLS[tool](arguments) == 0
    if tool == "report":
        assert (Path(arguments[0]) / "report.html").is_file()

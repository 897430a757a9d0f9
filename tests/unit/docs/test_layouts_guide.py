"""docs/layouts.md: its commands run and print the shown output."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from grpo_mega.cli import doctor, plan

REPOSITORY = Path(__file__).resolve().parents[3]
GUIDE = (REPOSITORY / "docs" / "layouts.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)\n```\n(?:\n```text\n(.*?)\n```)?", GUIDE, re.DOTALL)
TOOLS = {"plan": plan.main, "doctor": doctor.main}


def test_the_guide_has_commands() -> None:
    assert len(BLOCKS) == 9


@pytest.mark.parametrize(("command", "shown"), BLOCKS, ids=[c.partition("tool.sh ")[2][:60] for c, _ in BLOCKS])
def test_a_command_prints_the_shown_output(
    command: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    launcher, tool, *arguments = shlex.split(command.replace("/tmp/memory.html", str(tmp_path / "memory.html")))
    assert launcher == "launch/tool.sh"
    code = TOOLS[tool](arguments)
    printed = capsys.readouterr().out.strip()
    assert code == (2 if "does not fit" in printed else 0)
    if shown:
        assert printed == shown

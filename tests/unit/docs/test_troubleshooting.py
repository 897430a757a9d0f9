"""docs/troubleshooting.md: every message in it is one that the program says; its commands run."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from grpo_mega.cli import doctor
from tests.helpers.guides import blocks
from tests.helpers.jobs import REPOSITORY

TEXT = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def messages() -> list[str]:
    """What stands in code in the first column of the tables."""
    cells = [line.split("|")[1].strip() for line in TEXT.splitlines() if line.startswith("| `")]
    return [cell.strip("`").replace("` … `", " … ") for cell in cells]


def _texts(tree: ast.AST) -> list[str]:
    """Every string of a module; what is filled in is `…`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
            found.append("".join(parts))
    return found


@cache
def said() -> list[str]:
    modules = [path.read_text("utf-8") for path in (REPOSITORY / "grpo_mega").rglob("*.py")]
    script = (REPOSITORY / "launch" / "setup.sh").read_text("utf-8")
    return [*(text for module in modules for text in _texts(ast.parse(module))), script]


def test_the_guide_has_messages() -> None:
    assert len(messages()) > 20


@pytest.mark.parametrize("message", messages())
def test_a_message_of_the_guide_is_one_that_the_program_says(message: str) -> None:
    """A filled-in part may be any text on either side."""
    pattern = re.compile(".+?".join(re.escape(part) for part in message.split("…")), re.DOTALL)
    assert any(pattern.search(text) for text in said())


def test_the_command_of_the_guide_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    (block,) = blocks("troubleshooting.md")
    python, tool, *arguments = shlex.split(block)
    assert (python, tool) == ("python", "tools/doctor.py")
    assert doctor.main(arguments) == 0
    assert capsys.readouterr().out


def test_files_that_the_guide_links_to_are_there() -> None:
    linked = set(re.findall(r"\]\(([\w./-]+\.md)\)", TEXT))
    assert linked
    assert [name for name in linked if not (Path(REPOSITORY) / "docs" / name).is_file()] == []

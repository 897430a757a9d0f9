"""docs/troubleshooting.md: every message in it is in the source code, and its commands run."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from grpo_mega.cli import doctor
from tests.helpers.guides import shell_blocks
from tests.helpers.jobs import REPOSITORY

TEXT = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def documented_messages() -> list[str]:
    """Return the messages in the first column of the tables."""
    cells = [line.split("|")[1].strip() for line in TEXT.splitlines() if line.startswith("| `")]
    return [cell.strip("`").replace("` … `", " … ") for cell in cells]


def _text(node: ast.expr) -> str | None:
    """Return the text of a string literal, with `…` for each filled-in part; None for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
    return None


def _texts(tree: ast.AST) -> list[str]:
    """Return every string of a module; a UserError's message and remedy as one text."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.expr) and (text := _text(node)) is not None:
            found.append(text)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
            parts = [_text(value) for value in (*node.args, *(k.value for k in node.keywords))]
            found.append("; ".join(part or "…" for part in parts))
    return found


@cache
def program_texts() -> list[str]:
    modules = [path.read_text("utf-8") for path in (REPOSITORY / "grpo_mega").rglob("*.py")]
    script = (REPOSITORY / "launch" / "setup.sh").read_text("utf-8")
    return [*(text for module in modules for text in _texts(ast.parse(module))), script]


def test_the_guide_has_messages() -> None:
    assert len(documented_messages()) > 20


@pytest.mark.parametrize("message", documented_messages())
def test_a_message_of_the_guide_is_in_the_source_code(message: str) -> None:
    """Find the message in a text of the source code; a filled-in part matches any text."""
    pattern = re.compile(".+?".join(re.escape(part) for part in message.split("…")), re.DOTALL)
    assert any(pattern.search(text) for text in program_texts())


def test_the_command_of_the_guide_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    (block,) = shell_blocks("troubleshooting.md")
    program, tool, *arguments = shlex.split(block)
    assert (program, tool) == ("launch/tool.sh", "doctor")
    assert doctor.main(arguments) == 0
    assert capsys.readouterr().out


def test_files_that_the_guide_links_to_exist() -> None:
    linked = set(re.findall(r"\]\(([\w./-]+\.md)\)", TEXT))
    assert linked
    assert [name for name in linked if not (Path(REPOSITORY) / "docs" / name).is_file()] == []

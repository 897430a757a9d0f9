"""Rules of the tests' own layout: no test imports another test, and unit tests mirror the package."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.conftest import REPOSITORY

TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
ELSEWHERE = {"cli", "docs", "tools"}  # folders of tests/unit that test something other than a package


def imported_modules(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_no_module_imports_a_test() -> None:
    importers = {
        f"{path.relative_to(REPOSITORY)} imports {module}"
        for path in TESTS
        for module in imported_modules(path)
        if module.startswith("tests.") and module.rpartition(".")[2].startswith("test_")
    }
    assert importers == set()


def test_every_folder_of_unit_tests_is_a_package_of_the_code() -> None:
    unit = REPOSITORY / "tests" / "unit"
    folders = {str(path.parent.relative_to(unit)) for path in unit.rglob("test_*.py")} - ELSEWHERE
    assert [folder for folder in sorted(folders) if not (REPOSITORY / "grpo_mega" / folder).is_dir()] == []

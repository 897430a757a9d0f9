"""Rules of the tests' own layout: no test imports another test, and unit tests mirror the package."""

from __future__ import annotations

import ast
from functools import cache
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


@cache
def names_of_module(path: Path) -> set[str]:
    """Return the names that a module defines or imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


def test_every_name_that_a_test_imports_from_a_helper_exists() -> None:
    """A test that is skipped here, or that runs only on GPUs, is not imported by the other tests."""
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in TESTS}
    missing = {
        f"{path.relative_to(REPOSITORY)}: {node.module}.{alias.name}"
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module in modules
        for alias in node.names
        if alias.name not in names_of_module(modules[node.module])
    }
    assert missing == set()

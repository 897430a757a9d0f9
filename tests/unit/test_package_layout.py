"""Rules of the package's layout: few files at its root, a docstring for each package, unique class names, sizes."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "grpo_mega"
MODULES = sorted(path for folder in ("grpo_mega", "tools") for path in (REPOSITORY / folder).rglob("*.py"))
MAX_ROOT_FILES, MAX_MODULE_LINES, MAX_FUNCTION_LINES = 6, 400, 70
# Names under which no one would look for a thing: they say neither what a module holds nor what it does.
VAGUE_NAMES = {"boxes", "held", "named", "files", "start", "make", "utils", "misc", "common", "helpers", "stuff"}


@cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_the_root_of_the_package_has_few_files() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "interfaces.py", "py.typed", "serve.py", "train.py", "types.py"}
    assert len(files) <= MAX_ROOT_FILES


def test_class_names_are_unique() -> None:
    homes = defaultdict(list)
    for path in MODULES:
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(name_of(path))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_no_module_is_long() -> None:
    lengths = {name_of(path): path.read_text(encoding="utf-8").count("\n") for path in MODULES}
    assert {name: n for name, n in lengths.items() if n > MAX_MODULE_LINES} == {}


def test_no_function_is_long() -> None:
    lengths = {
        f"{name_of(path)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in MODULES
        for node in ast.walk(syntax_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_no_module_has_a_vague_name() -> None:
    assert [name_of(path) for path in MODULES if path.stem in VAGUE_NAMES] == []


@pytest.mark.parametrize("package", sorted(p for p in PACKAGE.rglob("*") if any(p.glob("*.py"))), ids=name_of)
def test_every_package_has_a_docstring(package: Path) -> None:
    assert ast.get_docstring(syntax_tree(package / "__init__.py")), package

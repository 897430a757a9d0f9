"""Every test file and test function that a docstring of the package names exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
TEST_PATH = re.compile(r"\btests/[\w/]+(?:\.py)?(?:::\w+)?")
TEST_FUNCTION = re.compile(r"(?<![\w/.:])test_\w+\b(?!/|\.py)")


def docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def missing_references(source: str, test_names: frozenset[str]) -> list[str]:
    """Return the test paths and test functions in the docstrings of `source` that do not exist.

    `test_names` holds the names of all test functions and test modules.
    """
    missing = []
    for text in docstrings(source):
        for reference in TEST_PATH.findall(text):
            path, _, function = reference.partition("::")
            found = REPOSITORY / path
            if not found.exists() or (function and f"def {function}(" not in found.read_text()):
                missing.append(reference)
        missing += [name for name in TEST_FUNCTION.findall(text) if name not in test_names]
    return missing


@pytest.fixture(scope="module")
def test_names() -> frozenset[str]:
    names: set[str] = set()
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        names |= {path.stem, *re.findall(r"def (test_\w+)\(", path.read_text())}
    return frozenset(names)


def test_every_test_named_in_a_docstring_of_the_package_exists(test_names: frozenset[str]) -> None:
    missing = {
        str(path.relative_to(REPOSITORY)): found
        for path in sorted((REPOSITORY / "grpo_mega").rglob("*.py"))
        if (found := missing_references(path.read_text(), test_names))
    }
    assert missing == {}


@pytest.mark.parametrize(
    ("docstring", "missing"),
    [
        ("Asserted by tests/unit/test_docstring_references.py.", []),
        ("Asserted by tests/unit/no_such_test.py and tests/unit.", ["tests/unit/no_such_test.py"]),
        ("Tests: tests/unit/test_docstring_references.py::test_no_such.", [
            "tests/unit/test_docstring_references.py::test_no_such"
        ]),
        ("Invariants: asserted by test_no_such_claim.", ["test_no_such_claim"]),
    ],
)  # fmt: skip
def test_a_reference_to_a_missing_test_is_found(test_names: frozenset[str], docstring: str, missing: list[str]) -> None:
    source = f'class Documented:\n    """{docstring}"""\n'
    assert missing_references(source, test_names) == missing

"""The public functions of the packages that compute a run document their arguments, shapes, errors and sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("algorithm", "weight_sync", "planner", "rollout", "trainer")
FORMULAS = (
    "algorithm/advantages/",
    "algorithm/surrogates/",
    "algorithm/aggregate",
    "algorithm/controller",
    "algorithm/kl",
)
Function = ast.FunctionDef | ast.AsyncFunctionDef

SHAPE = re.compile(r"\[[A-Za-z_][^\]]*\]|shape")
ARRAY = re.compile(r"\b(Tensor|Ints|NDArray)\b")
TIMES = {"timeout", "delay", "duration", "interval"}
"""Names that need a unit, such as `timeout_seconds`."""
CONTRACT = re.compile(r"See `\w+|contract is `\w+|arguments are those of\s+`\w+")
"""A docstring that names the protocol, or the function, whose docstring holds the rest."""


@dataclass(frozen=True)
class PublicFunction:
    """A public function or method, or a constructor, with its docstring and the functions of its module by name."""

    name: str
    node: Function
    docstring: str
    module_functions: dict[str, Function]

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters, without `self` and `cls`."""
        arguments = self.node.args
        everything = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        return [each.arg for each in everything if each.arg not in ("self", "cls")]

    @property
    def annotations(self) -> str:
        """The annotations of all parameters and of the result."""
        arguments = self.node.args
        everything = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        return " ".join(ast.unparse(each) for each in [*(a.annotation for a in everything), self.node.returns] if each)

    def section(self, title: str) -> str | None:
        """Return the indented lines under `title:`, or None without such a section."""
        found = re.search(rf"^{title}:[ \t]*(.*(?:\n(?:[ \t].*|(?=\n)))*)", self.docstring, re.MULTILINE)
        return found[1] if found else None


def public_functions(source: str) -> Iterator[PublicFunction]:
    """Yield the public functions of a module and of its public classes. A constructor has its class's docstring too."""
    tree = ast.parse(source)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, Function)}

    def visit(body: list[ast.stmt], prefix: str, class_docstring: str) -> Iterator[PublicFunction]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, f"{prefix}{node.name}.", ast.get_docstring(node) or "")
            elif isinstance(node, Function) and (node.name == "__init__" or not node.name.startswith("_")):
                text = ast.get_docstring(node) or ""
                text = f"{class_docstring}\n\n{text}" if node.name == "__init__" else text
                yield PublicFunction(prefix + node.name, node, text, functions)

    yield from visit(tree.body, "", "")


def statements_outside_try(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of nested functions and without bodies of `try`, which may catch."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(child, ast.Try):
            for part in (*child.handlers, *child.orelse, *child.finalbody):
                yield part
                yield from statements_outside_try(part)
            continue
        yield child
        yield from statements_outside_try(child)


def raised_errors(function: PublicFunction) -> set[str]:
    """Return the names of the errors that a function raises itself, or through functions of its own module.

    An AssertionError is an error of the program, and a variable holds an error that is raised again: both are left out.
    """
    errors, pending, seen = set(), [function.node], {function.node.name}
    while pending:
        for node in statements_outside_try(pending.pop()):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                errors.add(ast.unparse(node.exc.func))
            if isinstance(node, ast.Call):
                target = node.func
                own = isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("self", "cls")
                name = target.id if isinstance(target, ast.Name) else target.attr if own else ""  # type: ignore[union-attr]
                if name in function.module_functions and name not in seen:
                    seen.add(name)
                    pending.append(function.module_functions[name])
    return {error for error in errors if error[0].isupper()} - {"AssertionError"}


def faults(function: PublicFunction, *, has_formula: bool) -> Iterator[str]:
    """Yield one line for each thing that the docstring lacks."""
    text, parameters = function.docstring, function.parameters
    if not text:
        yield "no docstring"
    if CONTRACT.search(text) is None:
        yield from (
            f"Raises: {error}" for error in raised_errors(function) if error not in (function.section("Raises") or "")
        )
        if len(parameters) > 3 and function.section("Args") is None:
            yield "Args: more than three parameters"
        if ARRAY.search(function.annotations) and SHAPE.search(text) is None:
            yield "shape of an array"
    if (arguments := function.section("Args")) is not None:
        indent = re.search(r"^[ \t]+", arguments, re.MULTILINE)
        listed = re.findall(rf"^{indent[0] if indent else ''}(\w+):", arguments, re.MULTILINE)
        if listed != parameters:
            yield f"Args: {listed} instead of {parameters}"
    yield from (f"unit of {name}" for name in parameters if name in TIMES)
    if has_formula and function.section("Source") is None:
        yield "Source"


def test_public_functions_document_arguments_shapes_errors_and_sources() -> None:
    package = REPOSITORY / "grpo_mega"
    paths = [package / "interfaces.py", *(path for name in PACKAGES for path in sorted((package / name).rglob("*.py")))]
    found = {}
    for path in paths:
        name = str(path.relative_to(package))
        for function in public_functions(path.read_text()):
            if lines := list(faults(function, has_formula=name.startswith(FORMULAS))):
                found[f"{name}: {function.name}"] = lines
    assert found == {}


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("def scale(x: int) -> int: ...", "no docstring"),
        ('def scale(x: Tensor) -> int:\n    """Return a number."""', "shape of an array"),
        ('def scale(a: int, b: int, c: int, d: int) -> int:\n    """Return a number."""', "Args: more than three"),
        ('def scale(a: int) -> int:\n    """Scale.\n\n    Args:\n        b: a number.\n    """', "Args: ['b']"),
        ('def scale(timeout: float) -> int:\n    """Return a number."""', "unit of timeout"),
        ('def scale(x: int) -> int:\n    """Return a number."""\n    raise ValueError(x)', "Raises: ValueError"),
        (
            'def scale(x: int) -> int:\n    """Return a number."""\n    return _check(x)\n'
            "def _check(x: int) -> int:\n    raise UserError(x)",
            "Raises: UserError",
        ),
    ],
)  # fmt: skip
def test_a_docstring_that_lacks_something_is_found(source: str, fault: str) -> None:
    (function,) = public_functions(source)
    assert [line for line in faults(function, has_formula=False) if line.startswith(fault)]


def test_an_error_that_the_function_catches_needs_no_section() -> None:
    source = (
        'def scale(x: int) -> int:\n    """Return a number."""\n    try:\n        return _check(x)\n'
        "    except ValueError:\n        return 0\ndef _check(x: int) -> int:\n    raise ValueError(x)"
    )
    (function,) = public_functions(source)
    assert list(faults(function, has_formula=False)) == []

"""Runs the program of reward `code` and then its test statements, inside of the sandbox.

The sandbox shows no file of this package: `tester_source` returns a program for `python -c` that contains the text of
this file. Descriptor 3 holds the job as JSON. For each statement that raises nothing, the secret and its number are
written to the first standard output. The program gets another standard output, and a tester with builtins of its own,
so that a replaced `exec` or `abs` changes no test.

Comparisons in the statements are calls of `compare`. The program's objects cannot equal a plain value by their own
`__eq__`: `class Any: __eq__ = lambda *_: True` passes no `assert f(1) == 2`. A program can still search its process for
the tests and the secret; tests that a program must not see need inputs and outputs instead.
Asserted by tests/unit/rewards/builtin/test_code.py.
"""

from __future__ import annotations

import ast
import json
import operator
import os
import sys
from collections import Counter, OrderedDict

TYPE_CHECKING = False  # the module typing would cost each test a hundredth of a second
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import CodeType
    from typing import Any

_NAME = "compare_values_of_test"  # not in any program by chance
_SCALARS = frozenset((int, float, complex, bool, str, bytes, type(None)))
_KEYS: type[Any] = type({}.keys())
_EXACT: dict[type, Callable[[Any], Any]] = {
    int: lambda value: int.__add__(value, 0),
    float: lambda value: float.__add__(value, 0.0),
    complex: lambda value: complex.__add__(value, 0j),
    str: str.__str__,
    bytes: lambda value: bytes.__add__(value, b""),
    bytearray: lambda value: bytes(bytearray.copy(value)),
    list: list.copy,
    tuple: lambda value: tuple.__getitem__(value, slice(None)),
    dict: dict.copy,
    set: lambda value: {*set.__iter__(value)},
    frozenset: lambda value: {*frozenset.__iter__(value)},
    _KEYS: lambda value: {*value},
}
"""Class of builtins -> copy of an instance of a subclass, made by the class itself and not by an overriding method."""
_CONTAINERS = (list, tuple, dict, set)
_NUMBERS = {("fractions", "Fraction"): f"{os.sep}fractions.py", ("decimal", "Decimal"): f"{os.sep}_pydecimal.py"}
"""Classes whose objects equal plain numbers -> end of the file of their methods, if these are written in Python."""
_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "eq", ast.NotEq: "ne", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge",
    ast.In: "in", ast.NotIn: "not in",
}  # fmt: skip
_RICH = ("__eq__", "__lt__", "__le__", "__gt__", "__ge__")
_mro = type.__dict__["__mro__"].__get__


def compare(operators: Sequence[str], *values: Any) -> Any:
    """Return the value of a comparison; `a < b < c` is (("lt", "lt"), a, b, c)."""
    return all(_pair(name, values[i], values[i + 1]) for i, name in enumerate(operators))


def _pair(name: str, left: Any, right: Any) -> Any:
    if name in ("in", "not in"):
        items = _exact(right)
        found = any(_same(left, item) for item in items) if isinstance(items, _CONTAINERS) else left in right
        return found == (name == "in")
    if _base(left) is None and _base(right) is None:
        return getattr(operator, name)(left, right)
    if name in ("eq", "ne"):
        return _equal(left, right) == (name == "eq")
    are_plain = all(_base(value) is not None or _is_number(value) for value in (left, right))
    return are_plain and getattr(operator, name)(_exact(left), _exact(right))


def _same(left: Any, right: Any) -> bool:
    return left is right or _equal(left, right)


def _equal(left: Any, right: Any) -> bool:
    """Return `left == right` without methods that the program wrote, unless both are objects of other classes."""
    base, other = _base(left), _base(right)
    if base is None and other is None:
        return bool(left == right)
    if base is None or other is None:
        return _is_number(left if base is None else right) and bool(left == right)
    plain, expected = _exact(left), _exact(right)
    if not (isinstance(plain, _CONTAINERS) and isinstance(expected, _CONTAINERS)):
        return bool(plain == expected)
    if all(type(item) in _SCALARS for value in (plain, expected) for item in _items(value)):
        is_special = type(left) is type(right) and type(left) in (OrderedDict, Counter)
        return bool(left == right) if is_special else bool(plain == expected)
    if type(plain) is not type(expected) or len(plain) != len(expected):
        return False
    if isinstance(plain, list | tuple):
        return all(map(_same, plain, expected))
    found, wanted = (list(each.items() if isinstance(each, dict) else each) for each in (plain, expected))
    return all(any(_same(item, each) for each in wanted) for item in found)


def _items(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else [*value]


def _base(value: Any) -> type | None:
    """Return the builtin class of a plain value, also of an instance of a subclass; None for other objects."""
    return next((each for each in _mro(type(value)) if each in _SCALARS or each in _EXACT), None)


def _exact(value: Any) -> Any:
    """Return a plain value as its builtin class: keys and frozen sets as a set, a bytearray as bytes."""
    base = _base(value)
    is_final = base is None or (type(value) is base and base not in (bytearray, frozenset, _KEYS))
    return value if is_final else _EXACT[base](value)  # type: ignore[index]


def _is_number(value: Any) -> bool:
    """Return True if the value is a Fraction or Decimal of the standard library with its own comparisons."""
    cls = type(value)
    file = _NUMBERS.get((cls.__module__, cls.__qualname__))
    if file is None or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        return False
    methods = [next(each.__dict__[name] for each in _mro(cls) if name in each.__dict__) for name in _RICH]
    codes = [getattr(method, "__code__", None) for method in methods]
    return all(
        type(method) is type(int.__eq__) if code is None else code.co_filename.endswith(file)
        for method, code in zip(methods, codes, strict=True)
    )


class _Comparisons(ast.NodeTransformer):
    """Replaces comparisons by calls of `compare`; `is` and `is not` stay."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if any(type(each) not in _OPERATORS for each in node.ops):
            return node
        names = ast.Tuple([ast.Constant(_OPERATORS[type(each)]) for each in node.ops], ast.Load())
        call = ast.Call(ast.Name(_NAME, ast.Load()), [names, node.left, *node.comparators], [])
        return ast.copy_location(call, node)


def _compile_statements(text: str, name: str) -> CodeType | None:
    try:
        return compile(ast.fix_missing_locations(_Comparisons().visit(ast.parse(text))), name, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def run(own_builtins: dict[str, Any]) -> None:
    """Run the job of descriptor 3."""
    with open(3, encoding="utf-8") as file:
        job = json.load(file)
    setup = _compile_statements(job["setup"], "setup.py")
    tests = [_compile_statements(test, "test.py") for test in job["tests"]]
    report, write, set_trace = os.dup(1), os.write, sys.settrace
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
    space: dict[str, Any] = {"__name__": "program"}
    exec(compile(job["program"], "program.py", "exec"), space)  # noqa: S102 - inside the sandbox
    if setup is None:
        return
    space["__builtins__"] = own_builtins | {_NAME: compare}
    set_trace(None)
    exec(setup, space)  # noqa: S102 - inside the sandbox
    for number, test in enumerate(tests):
        try:
            if test is None:
                continue
            exec(test, space)  # noqa: S102 - inside the sandbox
        except BaseException:  # noqa: S112 - a test that raises has failed
            continue
        write(report, f"{job['secret']} {number}\n".encode())


def tester_source() -> str:
    """Return the program for `python -c`: this file, with its own copy of the builtins."""
    from pathlib import Path

    text = Path(__file__).read_text(encoding="utf-8")
    return (
        "import builtins\n"
        "own = dict(vars(builtins))\n"
        f"space = {{'__name__': 'tester', '__builtins__': own, 'own': own}}\n"
        f"exec(compile({text + 'run(dict(own))'!r}, 'tester.py', 'exec'), space)\n"
    )

"""Conditions on rollouts, as in `grpo-mega rollouts --where "reward<0.5 and completion contains 'because'"`.

    condition  = conjunction { "or" conjunction }
    conjunction= negation { "and" negation }
    negation   = "not" negation | "(" condition ")" | comparison
    comparison = value OPERATOR value | value "is" ["not"] "null" | value "in" "(" value { "," value } ")"
    OPERATOR   = "<" "<=" ">" ">=" "=" "==" "!=" "contains"
    value      = column | "reward_components." name | "len(" column ")" | number | 'text' | "text" | "true" | "false"

A condition is parsed into compute functions of Arrow; nothing of it is executed as Python. A comparison with null is
null, and a row is selected only where the condition is true. `len` is the number of characters of a text and the number
of entries of a list. Asserted by tests/unit/observe/rollout_files/test_where.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from grpo_mega.config.nearest_name import nearest_name
from grpo_mega.observe.rollout_files.column_table import SCHEMA
from grpo_mega.types import UserError

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|(?P<text>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<name>[A-Za-z_][\w.]*)|(?P<symbol><=|>=|!=|==|[<>=(),]))"
)
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}
_COMPONENTS = "reward_components."
_MAX_DEPTH = 100


def select_rows(table: pa.Table, condition: str) -> pa.Table:
    """Return the rows for which the condition is true.

    Raises:
        UserError: the condition cannot be parsed, names an unknown column, or compares values of different types.
    """
    if not table.num_rows:
        _ConditionParser(condition, SCHEMA.empty_table()).parse()
        return table
    return table.filter(_ConditionParser(condition, table).parse())


@dataclass(frozen=True)
class _Operand:
    """A value of a comparison: its text in the condition, and an array or a scalar."""

    text: str
    value: Any

    @property
    def type(self) -> pa.DataType:
        found: pa.DataType = self.value.type
        return found


class _ConditionParser:
    """Parser of one condition that evaluates it for all rows of a table while it parses."""

    def __init__(self, condition: str, table: pa.Table) -> None:
        self._condition, self._table = condition, table
        self._tokens = _tokens_of(condition)
        self._position = self._depth = 0

    def parse(self) -> Any:
        """Return the condition's value for each row, a Boolean array that may have nulls."""
        found = self._condition_value()
        if self._position < len(self._tokens):
            raise self._wrong(f"{self._next()!r} was not expected", "write `and` or `or` between two comparisons")
        return found

    def _condition_value(self) -> Any:
        found = self._conjunction()
        while self._accept("or"):
            found = pc.or_kleene(found, self._conjunction())
        return found

    def _conjunction(self) -> Any:
        found = self._negation()
        while self._accept("and"):
            found = pc.and_kleene(found, self._negation())
        return found

    def _negation(self) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._wrong(f"more than {_MAX_DEPTH} nested parentheses or `not`", "simplify it")
        if self._accept("not"):
            found = pc.invert(self._negation())
        elif self._accept("("):
            found = self._condition_value()
            self._require(")")
        else:
            found = self._comparison()
        self._depth -= 1
        return found

    def _comparison(self) -> Any:
        left = self._operand()
        if self._accept("is"):
            negated = self._accept("not")
            self._require("null")
            found = pc.is_null(self._each_row(left))
            return pc.invert(found) if negated else found
        if self._accept("in"):
            self._require("(")
            found = self._compared(left, "=", self._operand())
            while self._accept(","):
                found = pc.or_kleene(found, self._compared(left, "=", self._operand()))
            self._require(")")
            return found
        operator = self._next()
        if operator == "contains":
            return self._contains(left, self._operand())
        if operator not in _OPERATORS:
            got = "ends" if operator is None else f"has {operator!r}"
            remedy = f"use {' '.join(_OPERATORS)}, `contains`, `in (...)` or `is null`"
            raise self._wrong(f"it {got} after {left.text}, where an operator is needed", remedy)
        return self._compared(left, operator, self._operand())

    def _compared(self, left: _Operand, operator: str, right: _Operand) -> Any:
        kinds = [_kind(operand.type) for operand in (left, right)]
        if kinds[0] != kinds[1] or kinds[0] == "list":
            described = " and ".join(f"{o.text} is a {k}" for o, k in zip((left, right), kinds, strict=True))
            raise self._wrong(f"{described}; they cannot be compared", "compare numbers with numbers, text with 'text'")
        return self._each_row(_Operand("", _OPERATORS[operator](left.value, right.value)))

    def _contains(self, left: _Operand, right: _Operand) -> Any:
        """Return True where a text has the other text in it, or a list of texts has it as an entry."""
        if not isinstance(right.value, pa.Scalar) or _kind(right.type) != "text":
            raise self._wrong(f"{right.text} must be a text in quotes after `contains`", "write for example 'because'")
        if _kind(left.type) == "text":
            return pc.match_substring(self._each_row(left), right.value.as_py())
        if pa.types.is_list(left.type) and pa.types.is_string(left.type.value_type):
            return pa.array([right.value.as_py() in (row or ()) for row in left.value.to_pylist()], pa.bool_())
        raise self._wrong(f"{left.text} is not a text", "use `contains` with completion, prompt or reward_failures")

    def _operand(self) -> _Operand:
        token = self._next()
        if token is None:
            raise self._wrong("it ends where a column or a value is needed", "complete it")
        if token[0] in "'\"":
            return _Operand(token, pa.scalar(re.sub(r"\\(.)", r"\1", token[1:-1])))
        if token in ("true", "false"):
            return _Operand(token, pa.scalar(token == "true"))
        if token == "len":
            self._require("(")
            name = self._next() or ""
            self._require(")")
            return _Operand(f"len({name})", self._length(name))
        if token[0] in "+-.0123456789":
            return _Operand(token, pa.scalar(float(token) if set(token) & set(".eE") else int(token)))
        return _Operand(token, self._column(token))

    def _length(self, name: str) -> Any:
        column = self._column(name)
        kind = _kind(column.type)
        if kind == "number":
            raise self._wrong(f"len({name}): {name} is a number", "use len with a text or a list")
        return pc.utf8_length(column) if kind == "text" else pc.list_value_length(column)

    def _column(self, name: str) -> Any:
        if name.startswith(_COMPONENTS):
            key = name.removeprefix(_COMPONENTS)
            return pc.map_lookup(self._table.column("reward_components"), pa.scalar(key), "first")
        if name not in SCHEMA.names:
            near = nearest_name(name, SCHEMA.names)
            known = f"its columns are {', '.join(SCHEMA.names)}"
            raise self._wrong(f"{name!r} is not a column", f"did you mean {near}?" if near else known)
        return self._table.column(name)

    def _each_row(self, operand: _Operand) -> Any:
        """Return the operand as an array with one value per row."""
        if isinstance(operand.value, pa.Scalar):
            return pa.repeat(operand.value, self._table.num_rows)
        return operand.value

    def _next(self) -> str | None:
        if self._position == len(self._tokens):
            return None
        self._position += 1
        return self._tokens[self._position - 1]

    def _accept(self, token: str) -> bool:
        found = self._position < len(self._tokens) and self._tokens[self._position] == token
        self._position += found
        return found

    def _require(self, token: str) -> None:
        if not self._accept(token):
            got = self._next()
            raise self._wrong(f"{token!r} is missing before {'the end' if got is None else repr(got)}", "add it")

    def _wrong(self, problem: str, remedy: str) -> UserError:
        return UserError(f"--where={self._condition}: {problem}", remedy=remedy)


def _tokens_of(condition: str) -> list[str]:
    found, position = list[str](), 0
    while condition[position:].strip():
        token = _TOKEN.match(condition, position)
        if token is None:
            rest = condition[position:].strip()
            raise UserError(
                f"--where={condition}: {rest[:20]!r} cannot be read",
                remedy="write comparisons such as reward < 0.5, with texts in quotes",
            )
        found.append(token[0].strip())
        position = token.end()
    return found


def _kind(of_type: pa.DataType) -> str:
    if pa.types.is_string(of_type):
        return "text"
    if pa.types.is_boolean(of_type):
        return "truth value"
    return "number" if pa.types.is_integer(of_type) or pa.types.is_floating(of_type) else "list"

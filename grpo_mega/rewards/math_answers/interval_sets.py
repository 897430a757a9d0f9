r"""Sets of real numbers as unions of intervals, to compare `x < 2`, `(-\infty, 2)` and unions in any order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cmp_to_key
from itertools import pairwise
from typing import NamedTuple

from grpo_mega.rewards.math_answers.answers import MathAnswer
from grpo_mega.rewards.math_answers.exact import UndefinedError, depends_on, fraction_value
from grpo_mega.rewards.math_answers.expressions import Expression
from grpo_mega.rewards.math_answers.numeric import NumericEvaluator
from grpo_mega.rewards.math_answers.scalars import are_equal_scalars

INFINITY = Expression("symbol", ("oo",))
_MINUS_INFINITY = Expression("negate", (INFINITY,))
_REVERSED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}
_MAX_INTERVALS = 20


class Interval(NamedTuple):
    """An interval of real numbers; a closed interval with equal ends is one number."""

    low: Expression
    has_low: bool
    high: Expression
    has_high: bool


_ALL = Interval(_MINUS_INFINITY, False, INFINITY, False)


def variable_of(answer: MathAnswer) -> str | None:
    """Return the variable that a relation bounds; None if there is no single one."""
    if answer.kind == "list":
        names = {variable_of(item) for item in answer.parts[0]}
        return names.pop() if len(names) == 1 else None
    if answer.kind != "relation":
        return None
    variables = [side for side in answer.parts[1] if depends_on(side) - {"oo"}]
    side = variables[0] if len(variables) == 1 else None
    if side is not None and side.kind == "absolute":
        side = side.args[0]
        side = side.args[0] if side.kind == "add" else side
    return side.args[0] if side is not None and side.kind == "symbol" else None


def read_region(answer: MathAnswer) -> list[Interval] | None:
    """Return disjoint intervals in increasing order; None when the answer is no set of real numbers.

    Relations that `or` joins must be disjoint: `x < 2 or x < 1` is a hedge.
    """
    intervals = _intervals(answer)
    if intervals is None or len(intervals) > _MAX_INTERVALS:
        return None
    return _merged(intervals)


def are_equal_regions(first: Sequence[Interval], second: Sequence[Interval]) -> bool:
    """Return True when both lists contain the same intervals with equal ends."""
    return len(first) == len(second) and all(
        a.has_low == b.has_low
        and a.has_high == b.has_high
        and are_equal_scalars(a.low, b.low)
        and are_equal_scalars(a.high, b.high)
        for a, b in zip(first, second, strict=True)
    )


def increasing_relation(
    operators: tuple[str, ...], sides: tuple[Expression, ...]
) -> tuple[tuple[str, ...], tuple[Expression, ...]]:
    """Return `a < b <= c` for `c >= b > a`, and other relations unchanged."""
    if any(operator not in (">", ">=") for operator in operators):
        return operators, sides
    return tuple(operator.replace(">", "<") for operator in reversed(operators)), tuple(reversed(sides))


def _intervals(answer: MathAnswer) -> list[Interval] | None:
    if answer.kind == "bracket":
        return _bracket_interval(answer)
    if answer.kind == "relation":
        return _relation_intervals(*answer.parts)
    if answer.kind == "set":
        points = [item.parts[0] for item in answer.parts[0] if item.kind == "scalar"]
        return [Interval(p, True, p, True) for p in points] if len(points) == len(answer.parts[0]) else None
    if answer.kind == "scalar" and answer.parts[0] == Expression("symbol", (r"\bb{R}",)):
        return [_ALL]
    if answer.kind == "union":
        return _united([_intervals(part) for part in answer.parts])
    is_choice = answer.kind == "list" and answer.separator == "or"
    if is_choice and len({item.kind for item in answer.parts[0]} | {"relation", "bracket"}) == 2:
        intervals = _united([_intervals(item) for item in answer.parts[0]])
        merged = None if intervals is None or len(intervals) > _MAX_INTERVALS else _merged(intervals)
        return merged if merged is not None and intervals is not None and len(merged) == len(intervals) else None
    if answer.kind == "list" and answer.separator == "and" and len(answer.parts[0]) == 2:
        return _intersected(answer)
    if answer.kind == "difference":
        whole, removed = _intervals(answer.parts[0]), _intervals(answer.parts[1])
        if whole is not None and removed is not None and all(point.low == point.high for point in removed):
            return _without_points(whole, [point.low for point in removed])
    return None


def _without_points(intervals: list[Interval], points: list[Expression]) -> list[Interval] | None:
    """Return the intervals without points inside of them; None if a point is an end or outside, or has no order."""
    parts = list(intervals)
    try:
        for point in points:
            places = [k for k, part in enumerate(parts) if _compare(part.low, point) < 0 < _compare(part.high, point)]
            if len(places) != 1:
                return None
            part = parts[places[0]]
            parts[places[0] : places[0] + 1] = [
                part._replace(high=point, has_high=False),
                part._replace(low=point, has_low=False),
            ]
    except UndefinedError:
        return None
    return parts


def _intersected(answer: MathAnswer) -> list[Interval] | None:
    """Return the interval of `x > 1 and x < 3`: one relation bounds it from below and the other from above."""
    if any(item.kind != "relation" for item in answer.parts[0]) or variable_of(answer) is None:
        return None
    bounds = [_intervals(item) for item in answer.parts[0]]
    if any(part is None or len(part) != 1 for part in bounds):
        return None
    first, second = (part[0] for part in bounds if part)
    if first.high != INFINITY:
        first, second = second, first
    if first.high != INFINITY or second.low != _MINUS_INFINITY or INFINITY in (second.high, first.low):
        return None
    return None if first.low == _MINUS_INFINITY else [Interval(first.low, first.has_low, second.high, second.has_high)]


def _absolute_interval(inner: Expression, operator: str, bound: Expression) -> list[Interval] | None:
    """Return the intervals of `|x| < 2`, where the bound is a positive number."""
    value = fraction_value(bound)
    center = Expression("number", (0, 1, 0))
    if (
        inner.kind == "add"
        and len(inner.args) == 2
        and inner.args[0].kind == "symbol"
        and not depends_on(inner.args[1])
    ):
        inner, center = inner.args[0], Expression("negate", (inner.args[1],))
    if inner.kind != "symbol" or value is None or value <= 0 or operator not in ("<", "<=", ">", ">="):
        return None
    low, has_bound = Expression("add", (center, Expression("negate", (bound,)))), operator.endswith("=")
    bound = Expression("add", (center, bound))
    if operator.startswith("<"):
        return [Interval(low, has_bound, bound, has_bound)]
    return [Interval(_MINUS_INFINITY, False, low, has_bound), Interval(bound, has_bound, INFINITY, False)]


def _united(parts: list[list[Interval] | None]) -> list[Interval] | None:
    united: list[Interval] = []
    for part in parts:
        if part is None:
            return None
        united += part
    return united


def _bracket_interval(answer: MathAnswer) -> list[Interval] | None:
    opening, closing, items = answer.parts
    if len(items) != 2 or any(item.kind != "scalar" or item.unit or item.label for item in items):
        return None
    low, high = (item.parts[0] for item in items)
    return [Interval(low, opening == "[", high, closing == "]")]


def _relation_intervals(operators: tuple[str, ...], sides: tuple[Expression, ...]) -> list[Interval] | None:
    places = [position for position, side in enumerate(sides) if depends_on(side) - {"oo"}]
    if len(operators) == 1 and len(places) == 1 and sides[places[0]].kind == "absolute":
        operator = operators[0] if places[0] == 0 else _REVERSED.get(operators[0], "")
        return _absolute_interval(sides[places[0]].args[0], operator, sides[1 - places[0]])
    if len(places) != 1 or sides[places[0]].kind != "symbol" or not set(operators) <= set(_REVERSED):
        return None
    place = places[0]
    low, has_low, high, has_high = _ALL
    if len(operators) > 2 or (len(operators) == 2 and place != 1):
        return None
    for position, operator in enumerate(operators):
        bound = sides[position] if position < place else sides[position + 1]
        relation = _REVERSED[operator] if position < place else operator
        if relation == "!=":
            return _complement([bound]) if len(operators) == 1 else None
        if relation == "=":
            return [Interval(bound, True, bound, True)] if len(operators) == 1 else None
        if relation in ("<", "<="):
            if high != INFINITY:
                return None
            high, has_high = bound, relation == "<="
        else:
            if low != _MINUS_INFINITY:
                return None
            low, has_low = bound, relation == ">="
    return [Interval(low, has_low, high, has_high)]


def _complement(points: list[Expression]) -> list[Interval] | None:
    order = _sorted_points(points)
    if order is None:
        return None
    ends = [_MINUS_INFINITY, *order, INFINITY]
    return [Interval(low, False, high, False) for low, high in pairwise(ends)]


def _sorted_points(points: list[Expression]) -> list[Expression] | None:
    try:
        return sorted(points, key=cmp_to_key(_compare))
    except UndefinedError:
        return None


def _compare(first: Expression, second: Expression) -> int:
    """Return -1, 0 or 1. Raises UndefinedError for ends that are not real numbers."""
    if are_equal_scalars(first, second):
        return 0
    for sign, infinite in ((1, INFINITY), (-1, _MINUS_INFINITY)):
        if infinite in (first, second):
            return sign if first == infinite else -sign
    if depends_on(first) or depends_on(second):
        raise UndefinedError
    exact = fraction_value(first), fraction_value(second)
    if exact[0] is not None and exact[1] is not None:
        return -1 if exact[0] < exact[1] else 1
    evaluator = NumericEvaluator(1)
    a, b = evaluator.evaluate(first), evaluator.evaluate(second)
    if hasattr(a, "_mpc_") or hasattr(b, "_mpc_"):
        raise UndefinedError
    return -1 if a < b else 1


def _compare_starts(first: Interval, second: Interval) -> int:
    return _compare(first.low, second.low) or second.has_low - first.has_low


def _merged(intervals: list[Interval]) -> list[Interval] | None:
    """Return the union of intervals in increasing order; None when the ends cannot be ordered."""
    try:
        if any(_compare(part.low, part.high) > 0 for part in intervals):
            return None
        if len(intervals) == 1:
            return intervals
        rest = sorted(intervals, key=cmp_to_key(_compare_starts))
        merged = rest[:1]
        for part in rest[1:]:
            last = merged[-1]
            order = _compare(part.low, last.high)
            if order > 0 or (order == 0 and not (part.has_low or last.has_high)):
                merged.append(part)
                continue
            end = _compare(part.high, last.high)
            if end > 0:
                merged[-1] = last._replace(high=part.high, has_high=part.has_high)
            elif end == 0:
                merged[-1] = last._replace(has_high=last.has_high or part.has_high)
        return merged
    except UndefinedError:
        return None

"""Statements compare values, not methods that the program wrote."""

from __future__ import annotations

import collections
import decimal
import enum
import fractions
import types
import weakref
from typing import Any
from unittest import mock

import pytest

from grpo_mega.rewards.statement_tester import compare


class Always:
    """Equals everything and is in every order with everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return True

    def _true(self, other: object) -> bool:
        return True

    def _self(self, *_: object) -> Always:
        return self

    __hash__ = None  # type: ignore[assignment]
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _true
    __sub__ = __rsub__ = __abs__ = __round__ = __getitem__ = _self


class Hashable(Always):
    def __hash__(self) -> int:
        return hash(3)


class AlwaysInt(int):
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = Always._true  # type: ignore[assignment]
    __hash__ = int.__hash__


class AlwaysList(list[Any]):
    __eq__ = __ne__ = __lt__ = __gt__ = Always._true  # type: ignore[assignment]

    def __iter__(self) -> Any:
        return iter([1, 2])

    def __len__(self) -> int:
        return 2

    __hash__ = None  # type: ignore[assignment]


class AlwaysText(str):
    __eq__ = Always._true  # type: ignore[assignment]
    __hash__ = str.__hash__


class Imitation(Always):
    __module__, __qualname__ = "fractions", "Fraction"


class Color(enum.IntEnum):
    RED = 1


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and other.x == self.x

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("eq", Always(), 3),
        ("eq", 3, Always()),
        ("eq", AlwaysInt(4), 3),
        ("eq", [Always()], [3]),
        ("eq", [[1, Always()]], [[1, 2]]),
        ("eq", (1, Always()), (1, 2)),
        ("eq", {"a": Always()}, {"a": 1}),
        ("eq", {Hashable()}, {3}),
        ("eq", {Hashable(): 1}.keys(), {3}),
        ("eq", {Hashable(): 1}, {3: 1}),
        ("eq", AlwaysList([5]), [1, 2]),
        ("eq", AlwaysText("a"), "b"),
        ("eq", Imitation(), 0.5),
        ("eq", mock.ANY, 3),
        ("eq", weakref.proxy(ALWAYS := Hashable()), 3),
        ("eq", types.MappingProxyType(collections.UserDict(a=1)), {"a": 2}),
        ("eq", collections.Counter(a=1, b=2), collections.Counter(a=1)),
        ("eq", "1", 1),
        ("eq", [1], (1,)),
        ("lt", Always(), 1e-6),
        ("gt", 1e-6, Always()),
        ("lt", AlwaysInt(4), 3),
        ("in", Always(), (1, 2)),
        ("in", 3, [Hashable()]),
        ("not in", 3, [3]),
        ("ne", AlwaysInt(3), 3),
    ],
)
def test_a_class_of_the_program_equals_no_plain_value(name: str, left: object, right: object) -> None:
    assert compare((name,), left, right) is False


@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("eq", 3, 3.0),
        ("eq", True, 1),
        ("eq", fractions.Fraction(1, 2), 0.5),
        ("eq", 1, fractions.Fraction(1)),
        ("lt", decimal.Decimal("0.1"), 1),
        ("eq", decimal.Decimal(2), 2),
        ("eq", Color.RED, 1),
        ("eq", AlwaysInt(3), 3),
        ("eq", Point(1), Point(1)),
        ("eq", [Point(1)], [Point(1)]),
        ("ne", Point(1), 1),
        ("ne", None, 0),
        ("eq", {1: [2], 3: (4,)}, {3: (4,), 1: [2]}),
        ("eq", collections.OrderedDict(a=1), {"a": 1}),
        ("eq", collections.defaultdict(int, a=1), {"a": 1}),
        ("eq", collections.Counter(a=1, b=0), collections.Counter(a=1)),
        ("eq", frozenset((1, 2)), {2, 1}),
        ("eq", {1: 2}.keys(), {1}),
        ("eq", range(3), range(3)),
        ("eq", b"a", bytearray(b"a")),
        ("eq", collections.namedtuple("P", "x y")(1, [2]), (1, [2])),
        ("eq", [{1, 2}, {3: {4}}], [{2, 1}, {3: {4}}]),
        ("in", "b", "abc"),
        ("in", 1, {1: 2}),
        ("not in", 1, range(5, 9)),
        ("lt", (1, 2), (1, 3)),
        ("le", [1], [1]),
        ("gt", "b", "a"),
    ],
)
def test_honest_values_compare_as_in_python(name: str, left: object, right: object) -> None:
    assert compare((name,), left, right) is True


def test_a_chain_holds_if_all_its_pairs_do() -> None:
    assert compare(("lt", "le"), 1, 2, 2)
    assert not compare(("lt", "lt"), 1, 2, 2)
    with pytest.raises(TypeError):
        compare(("lt",), 1, "a")


def test_an_order_with_keys_of_an_ordered_mapping_counts() -> None:
    first, second = collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1)
    assert not compare(("eq",), first, second)
    assert compare(("eq",), first, dict(second))

r"""Exact evaluation of expressions: as fractions, and modulo a prime at a point.

A rational expression with variables is compared by its residue at pseudo-random points. Two different expressions of
degree d agree at a point with probability about d / 2^127 (Schwartz-Zippel). Large powers cost nothing: `9^{9^{9}}` and
`2^{10000000}+1` have residues that are computed at once. `i` is a square root of -1 modulo the prime. `\pi` and `e` are
treated as variables, because no rational relation between them is known.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from typing import Any

from grpo_mega.rewards.math_answers.expressions import Expression

PRIME = 2**127 - 39  # congruent to 1 modulo 4, so -1 has a square root
_IMAGINARY = next(root for g in range(2, 50) if (root := pow(g, (PRIME - 1) // 4, PRIME)) ** 2 % PRIME == PRIME - 1)
_MAX_BITS = 4000  # of an exact fraction: it is an exponent or an argument of a function
_MAX_FACTORIAL = 3000


class NotRationalError(Exception):
    """The expression needs numeric evaluation: it contains a root, a function or a power that is not an integer."""


class UndefinedError(Exception):
    """The expression has no value: it divides by zero, for example."""


def fraction_value(expression: Expression) -> Fraction | None:
    """Return the exact value of an expression without variables; None if it is irrational, undefined or very large."""
    try:
        return _fraction(expression)
    except (NotRationalError, ZeroDivisionError):
        return None


def _fraction(expression: Expression) -> Fraction:
    kind, args = expression
    if kind == "number":
        mantissa, denominator, power = args
        if abs(power) * 4 > _MAX_BITS:
            raise NotRationalError
        value = Fraction(Fraction(mantissa, denominator) * Fraction(10) ** power)
    elif kind == "add":
        value = sum((_fraction(term) for term in args), Fraction(0))
    elif kind == "multiply":
        value = _fraction(args[0]) * _fraction(args[1])
    elif kind == "divide":
        value = _fraction(args[0]) / _fraction(args[1])
    elif kind == "negate":
        value = -_fraction(args[0])
    elif kind == "percent":
        value = _fraction(args[0]) / 100
    elif kind == "power":
        value = _fraction_power(_fraction(args[0]), _fraction(args[1]))
    elif kind == "factorial":
        value = Fraction(math.factorial(_small_integer(args[0], 400)))
    elif kind == "binomial":
        value = Fraction(math.comb(_small_integer(args[0], 2000), _small_integer(args[1], 2000)))
    elif kind in ("absolute", "floor", "ceiling"):
        inner = _fraction(args[0])
        value = abs(inner) if kind == "absolute" else Fraction((math.floor if kind == "floor" else math.ceil)(inner))
    else:
        raise NotRationalError
    if value.numerator.bit_length() + value.denominator.bit_length() > _MAX_BITS:
        raise NotRationalError
    return value


def _fraction_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or (base == 0 and exponent == 0):
        raise NotRationalError
    bits = base.numerator.bit_length() + base.denominator.bit_length()
    if base not in (0, 1, -1) and abs(exponent) * bits > _MAX_BITS:
        raise NotRationalError
    if abs(base) == 1:
        return base if exponent % 2 else abs(base)
    return base**exponent.numerator


def _small_integer(expression: Expression, largest: int) -> int:
    value = _fraction(expression)
    if value.denominator != 1 or not 0 <= value <= largest:
        raise NotRationalError
    return value.numerator


def symbol_residue(name: str, point: int) -> int:
    """Return the pseudo-random value of a variable at a point."""
    if name == "i":
        return _IMAGINARY
    return int.from_bytes(hashlib.blake2b(f"{point} {name}".encode(), digest_size=16).digest(), "big") % PRIME


def residue(expression: Expression, point: int) -> int:
    """Return the value of a rational expression modulo PRIME at a point.

    Raises:
        NotRationalError: the expression is not rational.
        UndefinedError: it divides by zero, or contains 0^0.
    """
    kind, args = expression
    if kind == "number":
        mantissa, denominator, power = args
        return int(mantissa * _inverse(denominator) * pow(10, power, PRIME) % PRIME)
    if kind == "symbol":
        return symbol_residue(args[0], point)
    if kind == "add":
        return sum(residue(term, point) for term in args) % PRIME
    if kind == "multiply":
        return residue(args[0], point) * residue(args[1], point) % PRIME
    if kind == "divide":
        return residue(args[0], point) * _inverse(residue(args[1], point)) % PRIME
    if kind == "negate":
        return -residue(args[0], point) % PRIME
    if kind == "percent":
        return residue(args[0], point) * _inverse(100) % PRIME
    if kind == "degrees":
        return residue(args[0], point) * symbol_residue("pi", point) * _inverse(180) % PRIME
    if kind == "power":
        return _residue_power(args[0], args[1], point)
    if kind == "factorial":
        return math.factorial(_small_integer(args[0], _MAX_FACTORIAL)) % PRIME
    value = _fraction(expression)  # absolute values, floors and binomials of numbers
    return value.numerator * _inverse(value.denominator) % PRIME


def _residue_power(base: Expression, exponent: Expression, point: int) -> int:
    power = _fraction(exponent)
    if power.denominator != 1:
        raise NotRationalError
    value = residue(base, point)
    if power <= 0 and value == 0:
        raise UndefinedError
    return pow(value, power.numerator, PRIME)


def _inverse(value: int) -> int:
    if value % PRIME == 0:
        raise UndefinedError
    return pow(value, -1, PRIME)


def depends_on(expression: Expression) -> frozenset[str]:
    """Return the names of the variables in an expression; `e`, `i` and `pi` are constants."""
    if expression.kind == "symbol":
        return frozenset(expression.args) - {"e", "i", "pi"}
    names: frozenset[str] = frozenset()
    for arg in expression.args:
        if isinstance(arg, Expression):
            names |= depends_on(arg)
    return names


def contains_kind(expression: Expression, kind: str, name: str | None = None) -> bool:
    """Return True when a node of the expression has this kind, and this first argument if one is given."""
    if expression.kind == kind and name in (None, expression.args[0]):
        return True
    return any(isinstance(arg, Expression) and contains_kind(arg, kind, name) for arg in expression.args)


def sign_variants(expression: Expression) -> list[Expression]:
    r"""Return the expressions that `\pm` and `\mp` stand for.

    Several `\pm` have independent signs. If one of them is `\mp`, all signs change together.
    """
    serials = sorted(_serials(expression))
    if not serials:
        return [expression]
    if len(serials) > 4:
        raise UndefinedError
    if contains_minus_plus(expression):
        choices = [dict.fromkeys(serials, sign) for sign in (1, -1)]
    else:
        choices = [
            {serial: 1 - 2 * (number >> k & 1) for k, serial in enumerate(serials)}
            for number in range(2 ** len(serials))
        ]
    return [_with_signs(expression, choice) for choice in choices]


def contains_minus_plus(expression: Expression) -> bool:
    r"""Return True when the expression contains `\mp`."""
    if expression.kind == "plus_minus" and expression.args[1] == "mp":
        return True
    return any(isinstance(arg, Expression) and contains_minus_plus(arg) for arg in expression.args)


def _serials(expression: Expression) -> set[int]:
    found = {expression.args[0]} if expression.kind == "plus_minus" else set()
    for arg in expression.args:
        if isinstance(arg, Expression):
            found |= _serials(arg)
    return found


def _with_signs(expression: Expression, signs: dict[int, int]) -> Expression:
    args: tuple[Any, ...] = tuple(
        _with_signs(arg, signs) if isinstance(arg, Expression) else arg for arg in expression.args
    )
    if expression.kind != "plus_minus":
        return Expression(expression.kind, args)
    serial, name, argument = args
    is_positive = (signs[serial] > 0) == (name == "pm")
    return argument if is_positive else Expression("negate", (argument,))

r"""Decide whether two scalar expressions are equal, and whether two equations are multiples of each other.

Rational expressions are compared by their residues, exactly. Other expressions are compared numerically at several
points, with a relative tolerance of about 1e-30 and more digits where terms cancel or have very different sizes. An
expression that has no value, or one that is too large to compute, equals only the same expression.

A decimal number of at least 6 significant digits equals a number without a finite decimal form if it is that number
rounded to its digits: `0.333333` equals 1/3, and `0.33` and `0.333334` do not.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from grpo_mega.rewards.math_answers.exact import (
    NotRationalError,
    UndefinedError,
    contains_kind,
    depends_on,
    fraction_value,
    residue,
)
from grpo_mega.rewards.math_answers.expressions import Expression
from grpo_mega.rewards.math_answers.numeric import (
    BITS,
    MAX_BITS,
    NumericEvaluator,
    magnitude,
    power_of_two,
    real_number,
)

_POSITIVE_POINTS = (1, 2, 3)
_SIGNED_POINTS = (4, 5, 6)
_MIN_ROUNDED_DIGITS = 6
_TOO_FAR_APART = 60  # binary orders between terms of a sum, beyond which more precision is used


def difference(left: Expression, right: Expression) -> Expression:
    """Return the expression left - right."""
    return Expression("add", (left, Expression("negate", (right,))))


def are_equal_scalars(first: Expression, second: Expression) -> bool:
    """Return True when both expressions have a value and the same one, for all values of their variables."""
    if first == second:
        return True
    names = depends_on(first) | depends_on(second)
    if names & {"oo", "empty"}:  # no arithmetic with infinity
        return False
    try:
        return all(residue(first, point) == residue(second, point) for point in (1, 2)) or _is_rounded(first, second)
    except NotRationalError:
        pass
    except (UndefinedError, ZeroDivisionError):
        return False
    if _has_log(first) or _has_log(second):
        return any(_agree_numerically(first, second, names, decimal_log=base_10) for base_10 in (False, True))
    return _agree_numerically(first, second, names) or (not names and _is_rounded(first, second))


def _has_log(expression: Expression) -> bool:
    return contains_kind(expression, "function", "log")


def _agree_numerically(
    first: Expression, second: Expression, names: frozenset[str], *, decimal_log: bool = False
) -> bool:
    """Compare at positive points, and at signed points where both expressions are real without complex parts."""
    for point in _POSITIVE_POINTS if names else (1,):
        if _agree_at(first, second, point, signed=False, decimal_log=decimal_log) is not True:
            return False
    return all(
        _agree_at(first, second, point, signed=True, decimal_log=decimal_log) is not False
        for point in (_SIGNED_POINTS if names else ())
    )


def _agree_at(first: Expression, second: Expression, point: int, *, signed: bool, decimal_log: bool) -> bool | None:
    """Return None when the point says nothing: an expression is undefined there, or not real at a signed point."""
    bits = BITS
    for _ in range(3):
        evaluator = NumericEvaluator(point, bits=bits, signed=signed, decimal_log=decimal_log)
        try:
            a = evaluator.evaluate(first)
            is_first_complex, evaluator.is_complex = evaluator.is_complex, False
            b = evaluator.evaluate(second)
        except UndefinedError:
            return None
        if signed and (is_first_complex or evaluator.is_complex):
            has_absolute = contains_kind(first, "absolute") or contains_kind(second, "absolute")
            return False if has_absolute and is_first_complex != evaluator.is_complex else None
        needed = _needed_bits(a, b, evaluator)
        if needed <= bits:
            return bool(abs(a - b) <= max(abs(a), abs(b)) * power_of_two(-(bits * 3) // 4))
        if needed > MAX_BITS:
            return None
        bits = needed
    size = power_of_two(evaluator.largest - (evaluator.bits * 3) // 4)  # all digits of both sides cancel
    return bool(abs(a - b) <= size)


def _needed_bits(a: Any, b: Any, evaluator: NumericEvaluator) -> int:
    """Return the precision at which a comparison of both values is reliable."""
    sizes = [magnitude(value) for value in (a, b) if value != 0]
    largest = max([evaluator.largest, *sizes], default=0)
    smallest = min([evaluator.smallest, *sizes], default=0)
    spread = largest - smallest
    return BITS if spread <= _TOO_FAR_APART else BITS + 2 * spread


def _is_rounded(first: Expression, second: Expression) -> bool:
    return _is_rounded_from(first, second) or _is_rounded_from(second, first)


def _is_rounded_from(decimal: Expression, exact: Expression) -> bool:
    """Return True when `decimal` is a decimal number with enough digits, to which `exact` rounds."""
    number, sign = (decimal.args[0], -1) if decimal.kind == "negate" else (decimal, 1)
    if number.kind != "number" or number.args[1] != 1 or not -300 < number.args[2] < 0:
        return False
    mantissa, _, power = number.args
    if not 10 ** (_MIN_ROUNDED_DIGITS - 1) <= mantissa < 10**30 or depends_on(exact):
        return False
    unsigned = exact.args[0] if exact.kind == "negate" else exact
    value = fraction_value(exact)
    if (unsigned.kind == "number" and unsigned.args[1] == 1) or (value is not None and _has_finite_decimals(value)):
        return False
    target = Fraction(sign * mantissa) * Fraction(10) ** power
    try:
        exact_value = NumericEvaluator(1).evaluate(exact)
    except UndefinedError:
        return False
    distance = abs(exact_value - real_number(target.numerator, target.denominator))
    return bool(distance <= real_number(1, 2) * real_number(10, 1) ** power)


def _has_finite_decimals(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def are_proportional(first: Expression, second: Expression, *, positive: bool = False) -> bool:
    """Return True when first = c * second with a constant c that is not 0, and is positive if `positive`."""
    try:
        if not positive:
            a, b = ([residue(side, point) for point in (1, 2, 3)] for side in (first, second))
            return all(a) and all(b) and _cross_products_agree(a, b, lambda x, y: (x - y) % (2**127 - 39) == 0)
    except NotRationalError:
        pass
    except (UndefinedError, ZeroDivisionError):
        return False
    try:
        values = [
            (NumericEvaluator(point).evaluate(first), NumericEvaluator(point).evaluate(second))
            for point in _POSITIVE_POINTS
        ]
    except UndefinedError:
        return False
    left, right = [pair[0] for pair in values], [pair[1] for pair in values]
    noise = power_of_two(-BITS // 2)
    if any(abs(value) <= noise for value in [*left, *right]):
        return False
    if positive and not all(getattr(a / b, "imag", 0) == 0 and (a / b).real > 0 for a, b in values):
        return False
    return _cross_products_agree(left, right, lambda x, y: abs(x - y) <= abs(x) * noise)


def _cross_products_agree(a: list[Any], b: list[Any], agree: Callable[[Any, Any], bool]) -> bool:
    return all(agree(a[0] * b[k], a[k] * b[0]) for k in range(1, len(a)))

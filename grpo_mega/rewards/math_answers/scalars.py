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
_SIGNED_POINTS = ((4, 1), (5, 1), (6, 10), (7, 10), (8, 300), (9, 300), (10, 20_000), (11, 20_000))
"""Numbers of points at which variables may be negative, and the scale of the variables there."""
_LATTICE_POINTS = tuple((point, denominator) for denominator in (1, 2) for point in (12, 13, 14, 15))
"""Numbers of points at which variables are whole numbers, or halves, and their denominator there."""
_STEPS = ("floor", "ceiling")  # kinds of expressions that change suddenly at these points
_BITS_OF_CONSTANTS = 420
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
    """Compare at small positive points, and at signed points of several sizes where both expressions are real."""
    for point in _POSITIVE_POINTS if names else (1,):
        bits = BITS if names else _BITS_OF_CONSTANTS
        if _agree_at(first, second, NumericEvaluator(point, bits=bits, decimal_log=decimal_log)) is not True:
            return False
    has_factorial = any(contains_kind(side, kind) for side in (first, second) for kind in ("factorial", "binomial"))
    for point, scale in _SIGNED_POINTS if names else ():
        if has_factorial and scale > 1:  # the values have too many digits
            continue
        evaluator = NumericEvaluator(point, signed=True, scale=scale, decimal_log=decimal_log)
        if _agree_at(first, second, evaluator) is False:
            return False
    has_steps = any(contains_kind(side, kind) for side in (first, second) for kind in _STEPS)
    for point, denominator in _LATTICE_POINTS if names and has_steps else ():
        evaluator = NumericEvaluator(point, signed=True, decimal_log=decimal_log, denominator=denominator)
        if _agree_at(first, second, evaluator) is False:
            return False
    return True


def _agree_at(first: Expression, second: Expression, evaluator: NumericEvaluator) -> bool | None:
    r"""Return None when the point says nothing: an expression is undefined there, or not real at a signed point.

    If one expression is real and one is not, they are different, unless a negative variable is the cause: `\ln(xy)` is
    `\ln x + \ln y`.
    """
    for _ in range(3):
        a, is_first_complex = _value_at(first, evaluator)
        evaluator.is_complex = False
        b, _ = _value_at(second, evaluator)
        if a is None or b is None:
            # `0^x` is undefined, and nothing is too large
            is_small = evaluator.signed and evaluator.scale == 1 and not evaluator.denominator
            return False if is_small and (a is None) != (b is None) else None
        if evaluator.signed and (is_first_complex or evaluator.is_complex):
            is_same_domain = is_first_complex == evaluator.is_complex
            may_differ = evaluator.has_negative and not any(contains_kind(side, "absolute") for side in (first, second))
            return None if is_same_domain or may_differ else False
        needed = _needed_bits(a, b, evaluator)
        if needed <= evaluator.bits:
            rounding = power_of_two(evaluator.largest - evaluator.bits + 20)
            return bool(abs(a - b) <= max(max(abs(a), abs(b)) * power_of_two(-(evaluator.bits * 3) // 4), rounding))
        if needed > MAX_BITS:
            return None
        evaluator.bits = needed
    size = power_of_two(evaluator.largest - (evaluator.bits * 3) // 4)  # all digits of both sides cancel
    return bool(abs(a - b) <= size)


def _value_at(expression: Expression, evaluator: NumericEvaluator) -> tuple[Any, bool]:
    """Return the value, None if it is undefined, and True if the expression is not real."""
    try:
        return evaluator.evaluate(expression), evaluator.is_complex
    except UndefinedError:
        return None, evaluator.is_complex


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
    noise = power_of_two(-BITS // 2)
    pairs: list[tuple[Any, Any]] = []
    for point, scale in (*((point, 1) for point in _POSITIVE_POINTS), *_SIGNED_POINTS):
        is_signed = len(pairs) >= len(_POSITIVE_POINTS)
        evaluator = NumericEvaluator(point, signed=is_signed, scale=scale)
        try:
            a, b = evaluator.evaluate(first), evaluator.evaluate(second)
        except UndefinedError:
            if not is_signed:
                return False
            continue
        if is_signed and evaluator.is_complex:
            continue
        if abs(a) <= noise or abs(b) <= noise or (positive and not _is_positive(a / b)):
            return False
        pairs.append((a, b))
    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return _cross_products_agree(left, right, lambda x, y: abs(x - y) <= abs(x) * noise)


def _is_positive(value: Any) -> bool:
    return bool(getattr(value, "imag", 0) == 0 and value.real > 0)


def _cross_products_agree(a: list[Any], b: list[Any], agree: Callable[[Any, Any], bool]) -> bool:
    return all(agree(a[0] * b[k], a[k] * b[0]) for k in range(1, len(a)))

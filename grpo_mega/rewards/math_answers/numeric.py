r"""Numeric evaluation of expressions with many digits, for roots and functions.

Variables get pseudo-random values. Operations whose result would be very large are rejected before they are computed,
so the time of an evaluation is bounded by the size of the expression.
"""

from __future__ import annotations

import zlib
from typing import Any

from mpmath import MPContext  # type: ignore[import-untyped]

from grpo_mega.rewards.math_answers.exact import UndefinedError, fraction_value
from grpo_mega.rewards.math_answers.expressions import COMMUTATIVE_FUNCTIONS, Expression

BITS = 140
MAX_BITS = 6000
_MAX_MAGNITUDE = 40_000  # binary exponent of a value
_MAX_FACTORIAL = 20_000

_context: Any = MPContext()


class NumericEvaluator:
    """Evaluates expressions at one point. Afterwards, the attributes describe all evaluations of this object.

    Args:
        point: number of the pseudo-random values of the variables.
        bits: precision.
        signed: variables may be negative; points 2n and 2n+1 have opposite signs.
        scale: factor of the absolute values of the variables.
        decimal_log: a logarithm without a base has base 10 instead of e.
        denominator: if it is not 0, variables are small fractions with this denominator, in lowest terms.
    """

    def __init__(
        self,
        point: int,
        *,
        bits: int = BITS,
        signed: bool = False,
        scale: int = 1,
        decimal_log: bool = False,
        denominator: int = 0,
    ) -> None:
        self.denominator = denominator
        self.point, self.bits, self.signed, self.scale, self.decimal_log = point, bits, signed, scale, decimal_log
        self.is_complex = self.has_negative = False
        self.largest, self.smallest = -_MAX_MAGNITUDE, _MAX_MAGNITUDE  # binary exponents of the terms of sums

    def evaluate(self, expression: Expression) -> Any:
        """Return the value, a real or complex number of mpmath.

        Raises:
            UndefinedError: there is no value, or it is too large to compute.
        """
        _context.prec = self.bits
        try:
            return self._value(expression)
        except (ZeroDivisionError, ValueError, OverflowError, NotImplementedError, TypeError) as error:
            raise UndefinedError from error

    def _value(self, expression: Expression) -> Any:
        value = getattr(self, f"_{expression.kind}")(*expression.args)
        if value != 0 and not abs(_context.mag(value)) < _MAX_MAGNITUDE:
            raise UndefinedError
        if isinstance(value, _context.mpc):
            if abs(value.imag) <= abs(value.real) * _context.mpf(2) ** (16 - self.bits):
                return value.real
            self.is_complex = True
        return value

    def _number(self, mantissa: int, denominator: int, power: int) -> Any:
        if abs(power) * 3.4 > _MAX_MAGNITUDE:
            raise UndefinedError
        return _context.mpf(mantissa) / denominator * _context.mpf(10) ** power

    def _symbol(self, name: str) -> Any:
        if name in ("pi", "e"):
            return +(_context.pi if name == "pi" else _context.e)
        if name == "i":
            return _context.mpc(0, 1)
        digest = zlib.crc32(f"{self.point} {name}".encode())
        if self.denominator:
            value = _context.mpf(1 + digest % 5 * self.denominator) / self.denominator
        else:
            value = (_context.mpf(digest) / 2**32 * 2.5 + 0.4) * self.scale
        sign = zlib.crc32(name.encode()) >> self.point // 2 & 1
        if not (self.signed and sign ^ self.point % 2):
            return value
        self.has_negative = True
        return -value

    def _add(self, *terms: Expression) -> Any:
        values = [self._value(term) for term in terms]
        for value in values:
            if value != 0:
                magnitude = int(_context.mag(value))
                self.largest, self.smallest = max(self.largest, magnitude), min(self.smallest, magnitude)
        return sum(values[1:], values[0])

    def _multiply(self, left: Expression, right: Expression) -> Any:
        return self._value(left) * self._value(right)

    def _divide(self, left: Expression, right: Expression) -> Any:
        divisor = self._value(right)
        if divisor == 0:
            raise UndefinedError
        return self._value(left) / divisor

    def _negate(self, operand: Expression) -> Any:
        return -self._value(operand)

    def _percent(self, operand: Expression) -> Any:
        return self._value(operand) / 100

    def _degrees(self, operand: Expression) -> Any:
        return self._value(operand) * _context.pi / 180

    def _power(self, base: Expression, exponent: Expression) -> Any:
        value, fraction = self._value(base), fraction_value(exponent)
        power = self._value(exponent)
        if value == 0:
            if isinstance(power, _context.mpc) or power <= 0:
                raise UndefinedError
            return value
        size = abs(power) * (abs(_context.log(abs(value))) + 4)
        if not size < _MAX_MAGNITUDE:
            raise UndefinedError
        if fraction is None or isinstance(value, _context.mpc) or value > 0:
            return value ** (int(power) if fraction is not None and fraction.denominator == 1 else power)
        if fraction.denominator == 1:
            return value ** int(power)
        if fraction.denominator % 2 == 0:
            self.is_complex = True
            return value**power
        root = (-value) ** power  # the real root of a negative number
        return -root if fraction.numerator % 2 else root

    def _root(self, degree: Expression, radicand: Expression) -> Any:
        one = Expression("number", (1, 1, 0))
        if degree == Expression("number", (2, 1, 0)):
            value = self._value(radicand)
            self.is_complex = self.is_complex or isinstance(value, _context.mpc) or value < 0
            return _context.sqrt(value)
        return self._power(radicand, Expression("divide", (one, degree)))

    def _factorial(self, operand: Expression) -> Any:
        value = self._value(operand)
        if not abs(value) < _MAX_FACTORIAL:
            raise UndefinedError
        return _context.gamma(value + 1)

    def _binomial(self, upper: Expression, lower: Expression) -> Any:
        n, k = self._value(upper), self._value(lower)
        if not (abs(n) < _MAX_FACTORIAL and abs(k) < _MAX_FACTORIAL):
            raise UndefinedError
        return _context.binomial(n, k)

    def _absolute(self, operand: Expression) -> Any:
        return abs(self._value(operand))

    def _floor(self, operand: Expression) -> Any:
        exact = fraction_value(operand)
        value = self._value(operand)
        if exact is not None:
            return _context.mpf(exact.numerator // exact.denominator)
        if isinstance(value, _context.mpc):
            raise UndefinedError
        distance = abs(value - _context.nint(value))
        if distance < 1e-20 and not (self.denominator and distance == 0):
            raise UndefinedError
        return _context.floor(value)

    def _ceiling(self, operand: Expression) -> Any:
        return -self._floor(Expression("negate", (operand,)))

    def _log(self, base: Expression, argument: Expression) -> Any:
        divisor = self._logarithm(self._value(base))
        if divisor == 0:
            raise UndefinedError
        return self._logarithm(self._value(argument)) / divisor

    def _logarithm(self, value: Any) -> Any:
        if value == 0:
            raise UndefinedError
        self.is_complex = self.is_complex or isinstance(value, _context.mpc) or value < 0
        return _context.log(value)

    def _function(self, name: str, argument: Expression) -> Any:
        value = self._value(argument)
        if name in ("ln", "log", "lg"):
            logarithm = self._logarithm(value)
            return logarithm / _context.log(10) if name == "lg" or (name == "log" and self.decimal_log) else logarithm
        if not abs(value) < _MAX_MAGNITUDE / 2:
            raise UndefinedError
        names = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
        return getattr(_context, names.get(name, name))(value)

    def _call(self, name: str, *arguments: Expression) -> Any:
        """Return the value of an unknown function: a smooth function that its name selects."""
        value = _context.mpf(zlib.crc32(name.encode())) / 2**32
        numbers = [self._value(argument) for argument in arguments]
        if name in COMMUTATIVE_FUNCTIONS:
            numbers.sort(key=lambda number: (_context.re(number), _context.im(number)))
        for position, number in enumerate(numbers):
            if not abs(number) < 1000:
                raise UndefinedError
            value += _context.cos((2 + position + value) * number)
        return value

    def _plus_minus(self, *_: object) -> Any:
        raise UndefinedError  # sign_variants() replaces these nodes first


def magnitude(value: Any) -> int:
    """Return the binary exponent of a value that is not 0."""
    return int(_context.mag(value))


def power_of_two(exponent: int) -> Any:
    """Return 2^exponent."""
    return _context.ldexp(1, exponent)


def real_number(numerator: int, denominator: int) -> Any:
    """Return a fraction as a real number."""
    return _context.mpf(numerator) / denominator

"""Environment `calculator`: the policy writes `<<48/2>>`, and the environment appends `24`.

It computes only arithmetic, exactly: numbers, + - * / // % ** and brackets, with limits on length and size. It never
calls Python's eval.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction

from grpo_mega.environments.base import Turn, environment
from grpo_mega.types import UserError

OPEN, CLOSE = "<<", ">>"
MAX_CHARACTERS = 200
MAX_BITS = 1024
ERROR = "error"

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
_SIGNS = str.maketrans({"×": "*", "x": "*", "÷": "/", "−": "-", "$": None, ",": None, "_": None})


def check_calculator_args(digits: int = 4) -> None:
    """Check the arguments of `calculator`.

    Raises:
        UserError: `digits` is not a whole number from 0 to 20.
    """
    if isinstance(digits, bool) or not isinstance(digits, int) or not 0 <= digits <= 20:
        raise UserError(f"digits={digits!r} must be a whole number from 0 to 20", remedy="remove it for the default, 4")


@environment(stop=(CLOSE,), check_args=check_calculator_args, error=ERROR)
def calculator(prompt: str, turns: Sequence[Turn], reference: str, digits: int = 4) -> str | None:
    """Return the value of the `<<expression>>` at the end of the answer, or `error` if it cannot be computed.

    In GSM8K's own form `<<48/2=24>>` the text before the equals sign is computed. An answer that does not end with an
    expression ends the rollout.

    Args:
        prompt: not used.
        turns: the turns of the rollout; only the last answer is used.
        reference: not used.
        digits: maximum number of decimal places; trailing zeros are dropped.
    """
    answer = turns[-1].answer.rstrip()
    begin = answer.rfind(OPEN)
    if begin < 0 or not answer.endswith(CLOSE):
        return None
    try:
        expression = answer[begin + len(OPEN) : -len(CLOSE)].partition("=")[0]
        return format_value(evaluate(expression), digits)
    except (ValueError, ArithmeticError):
        return ERROR


def evaluate(expression: str) -> Fraction:
    """Return the exact value of an arithmetic expression.

    Raises:
        ValueError: the text is not an arithmetic expression, or a number is too large.
        ArithmeticError: division by zero.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"{len(expression)} characters are more than {MAX_CHARACTERS}")
    plain = expression.replace("^", "**").translate(_SIGNS).strip()
    try:
        tree = ast.parse(plain, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"{expression!r} is not arithmetic") from error
    return _evaluate_node(tree)


def _evaluate_node(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _check_size(Fraction(repr(node.value)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _evaluate_node(node.operand)
        return value if isinstance(node.op, ast.UAdd) else -value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = _evaluate_node(node.left), _evaluate_node(node.right)
        if exponent.denominator != 1 or abs(exponent) > MAX_BITS or (_bits(base) - 1) * abs(exponent) > MAX_BITS:
            raise ValueError("an exponent must be a small whole number")
        return _check_size(Fraction(base ** int(exponent)))
    if isinstance(node, ast.BinOp) and (apply := _BINARY.get(type(node.op))) is not None:
        return _check_size(apply(_evaluate_node(node.left), _evaluate_node(node.right)))
    raise ValueError(f"{type(node).__name__} is not arithmetic")


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _check_size(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise ValueError(f"a number has more than {MAX_BITS} bits")
    return value


def format_value(value: Fraction, digits: int) -> str:
    """Format a value as a decimal, rounded half up to at most `digits` decimal places."""
    scaled = (abs(value) * 10**digits + Fraction(1, 2)).__floor__()
    whole, decimals = divmod(scaled, 10**digits)
    fraction = f"{decimals:0{digits}d}".rstrip("0") if digits else ""
    sign = "-" if value < 0 and scaled else ""
    return f"{sign}{whole}.{fraction}" if fraction else f"{sign}{whole}"

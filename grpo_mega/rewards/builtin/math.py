r"""Reward `math`: the completion's final answer means the same as the reference's, LaTeX or plain.

The final answer is the last `\boxed{x}`; without one and unless `strict`, what math-verify finds at the end of the
text. Answers are compared by math-verify: fractions, decimals, radicals, equations, tuples, intervals, sets, matrices;
units are dropped, 50% is 0.5 or 50. A reference in words (`No, it is not closed.`) is compared as words.

Invariants (tests/unit/rewards/builtin/test_math.py): every real answer equals itself and its simple rewritings and
differs from its neighbour; an answer that explodes when it is evaluated costs at most `cpu_seconds`.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from typing import Any

from math_verify import parse, verify

from grpo_mega.rewards.answer_parsing import BOXED_START, boxed_contents
from grpo_mega.rewards.base import reward
from grpo_mega.rewards.cpu_limit import within_cpu_seconds
from grpo_mega.types import UserError

_TAIL = 1000  # characters at the end of a completion without a box that are searched for an answer
_LONGEST_ANSWER = 1000  # characters; the longest real answer is well below
_MAX_EXPONENT = 20_000
_MAX_FACTORIAL = 2_000
_DEEPEST_BRACKETS = 40
_WORDS_OF_PROSE = 3

_MATH = re.compile(r"\$\$.*?\$\$|\$[^$]*\$|\\\[.*?\\\]|\\\(.*?\\\)", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]{2,}")
_VERDICT = re.compile(r"\W*(?:yes|no|(?:[A-Za-z]{4,}|no|not)(?:\s+[A-Za-z]+)*)\W*", re.IGNORECASE)
_REASONED_VERDICT = re.compile(r"\W*(?:yes|no)\b\W.*", re.IGNORECASE | re.DOTALL)
_FILLER = frozenset(("the", "solution", "answer", "is", "are", "and", "or", "so", "therefore", "hence", "undefined"))
_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\b|\\[,;:! ]|\\left\b|\\right\b|~")
_NOISE = re.compile(r"[\s$.,;:!?(){}\"'*\\]+")
_RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|leqslant|geqslant|lt|gt)\b")
_POWER = re.compile(r"(?:\^|\*\*)[\s{(]*([0-9]+)")
_TOWER = re.compile(r"[0-9)}][\s)}]*(?:\^|\*\*)[\s{(]*[0-9]+[\s)}]*(?:\^|\*\*)[\s{(]*[0-9]")
_FACTORIAL = re.compile(r"([0-9]+|[)}!])\s*!")
_DIGITS = re.compile(r"[0-9]{400,}")

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # a line for each answer that it cannot read
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
sys.set_int_max_str_digits(20_000)  # beyond it sympy prints a number for minutes


def check_math_args(strict: bool = False, cpu_seconds: float = 2.0) -> None:
    """Refuse values that `math` cannot work with.

    Raises:
        UserError: `strict` is neither true nor false, or `cpu_seconds` is not positive.
    """
    if not isinstance(strict, bool):
        raise UserError(f"strict={strict!r} is neither true nor false", remedy="use one of them")
    if isinstance(cpu_seconds, bool) or not isinstance(cpu_seconds, int | float) or not 0 < cpu_seconds < 3600:
        raise UserError(f"cpu_seconds={cpu_seconds!r} is no number of seconds above 0", remedy="use for example 2.0")


@reward(low=0.0, high=1.0, check_args=check_math_args)
def math(prompt: str, completion: str, reference: str, strict: bool = False, cpu_seconds: float = 2.0) -> float:
    r"""1 when the final answers of completion and reference mean the same, else 0.

    Args:
        prompt: not looked at.
        completion: its final answer is extracted.
        reference: a bare answer, or a worked solution that ends in `\boxed{x}`.
        strict: demand a box; an answer in prose is then none.
        cpu_seconds: processor time; an answer that cannot be compared within it is wrong.

    Raises:
        ValueError: the reference is empty.
    """
    expected = _boxed_or(reference, reference.strip())
    if not expected:
        raise ValueError("the reference is empty; correct the data or its answer_key")
    answer = _boxed_or(completion, None if strict else completion[-_TAIL:].strip())
    if not answer:
        return 0.0
    if _plain(answer) == _plain(expected) != "":
        return 1.0
    if is_prose(expected):
        words = _words(expected)
        return float(bool(words) and _words(answer[-2 * len(expected) - 80 :])[-len(words) :] == words)
    if _explodes(answer):
        return 0.0
    return float(within_cpu_seconds(cpu_seconds, lambda: any(_same(e, answer) for e in _forms(expected))) or False)


def is_prose(answer: str) -> bool:
    """Whether an answer is a sentence, so that the formulas inside are not the answer."""
    words = [word for word in _WORD.findall(_MATH.sub(" ", answer)) if word.lower() not in _FILLER]
    return len(words) >= _WORDS_OF_PROSE or any(form.fullmatch(answer) for form in (_VERDICT, _REASONED_VERDICT))


def _boxed_or(text: str, otherwise: str | None) -> str | None:
    if BOXED_START not in text:
        return otherwise
    contents = boxed_contents(text)
    return otherwise if contents is None else contents.strip()


def _plain(answer: str) -> str:
    """Without white space, LaTeX's marks of text and size, and punctuation; in lower case."""
    if len(answer) > 20 * _LONGEST_ANSWER:
        return ""
    return _NOISE.sub("", _COMMAND.sub("", answer.replace("dfrac", "frac").replace("tfrac", "frac"))).casefold()


def _words(text: str) -> list[str]:
    return _NOISE.sub(" ", _COMMAND.sub("", text)).casefold().split()


def _depth(answer: str) -> int:
    """How many brackets are open at most: the parser's time grows with a power of it."""
    depth = deepest = 0
    for character in answer:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}" and depth:
            depth -= 1
    return deepest


def _explodes(answer: str) -> bool:
    """Whether evaluating it would take one operation that nothing can interrupt: `9^{9^9}`, `99999999!`."""
    if (
        len(answer) > 2 * _LONGEST_ANSWER
        or _depth(answer) > _DEEPEST_BRACKETS
        or _DIGITS.search(answer)
        or _TOWER.search(answer)
    ):
        return True
    exponents = [int(exponent) for exponent in _POWER.findall(answer)]
    factorials = [int(operand) if operand.isdigit() else _MAX_FACTORIAL + 1 for operand in _FACTORIAL.findall(answer)]
    return max(exponents, default=0) > _MAX_EXPONENT or max(factorials, default=0) > _MAX_FACTORIAL


def _forms(expected: str) -> list[str]:
    r"""The ways in which one reference says its answer: `x \le 2 : (-\infty, 2]` says it twice."""
    left, colon, right = expected.strip("$ ").rpartition(":")
    if colon and _RELATION.search(left) and right.strip()[:1] in ("(", "["):
        return [right.strip(), left.strip()]
    return [expected]


def _same(expected: str, answer: str) -> bool:
    wanted = _parsed(expected)
    return bool(wanted) and bool(verify(wanted, parse(_as_latex(answer), parsing_timeout=None), timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def _parsed(answer: str) -> list[Any]:
    return parse(_as_latex(answer), parsing_timeout=None)  # type: ignore[no-any-return]


def _as_latex(answer: str) -> str:
    return answer if "$" in answer or "\\[" in answer or "\\(" in answer else f"${answer}$"

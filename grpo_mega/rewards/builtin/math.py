r"""Reward `math`: the final answer of the completion is mathematically equal to that of the reference.

Answers may be LaTeX or plain text. The final answer is the last `\boxed{x}`. Without a box, and unless `strict`, it is
the answer that math-verify finds at the end of the text. math-verify compares fractions, decimals, radicals, equations,
tuples, intervals, sets and matrices. Units are dropped, and 50% equals 0.5 or 50. A reference in words (`No, it is not
closed.`) is compared as words.

Invariants (tests/unit/rewards/builtin/test_math.py): every answer of the test data equals itself and its simple
rewritings, and differs from the next one; an answer that is expensive to evaluate costs at most `cpu_seconds`.
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

_TAIL = 1000  # characters at the end of a completion without a box in which an answer is searched
_MAX_ANSWER_CHARACTERS = 1000  # more than the longest answer of the test data
_MAX_EXPONENT = 20_000
_MAX_FACTORIAL = 2_000
_MAX_BRACKET_DEPTH = 40
_MIN_PROSE_WORDS = 3

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

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs one line per answer that it cannot parse
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
sys.set_int_max_str_digits(20_000)  # sympy would spend minutes on printing a longer number


def check_math_args(strict: bool = False, cpu_seconds: float = 2.0) -> None:
    """Check the arguments of `math`.

    Raises:
        UserError: `strict` is not a boolean, or `cpu_seconds` is out of range.
    """
    if not isinstance(strict, bool):
        raise UserError(f"strict={strict!r} must be true or false", remedy="use one of them")
    if isinstance(cpu_seconds, bool) or not isinstance(cpu_seconds, int | float) or not 0 < cpu_seconds < 3600:
        raise UserError(
            f"cpu_seconds={cpu_seconds!r} must be a number of seconds above 0", remedy="use for example 2.0"
        )


@reward(low=0.0, high=1.0, check_args=check_math_args)
def math(prompt: str, completion: str, reference: str, strict: bool = False, cpu_seconds: float = 2.0) -> float:
    r"""Return 1 when the final answers of completion and reference are equal, else 0.

    Args:
        prompt: not used.
        completion: the final answer is extracted from it.
        reference: only the answer, or a worked solution that ends in `\boxed{x}`.
        strict: accept only a box; an answer in prose is not an answer then.
        cpu_seconds: CPU time; an answer that cannot be compared within it is wrong.

    Raises:
        ValueError: the reference is empty.
    """
    expected = _boxed_answer(reference, reference.strip())
    if not expected:
        raise ValueError("the reference is empty; correct the data or its answer_key")
    answer = _boxed_answer(completion, None if strict else completion[-_TAIL:].strip())
    if not answer:
        return 0.0
    if _plain(answer) == _plain(expected) != "":
        return 1.0
    if is_prose(expected):
        words = _words(expected)
        return float(bool(words) and _words(answer[-2 * len(expected) - 80 :])[-len(words) :] == words)
    if _is_too_expensive(answer):
        return 0.0
    return float(
        within_cpu_seconds(cpu_seconds, lambda: any(_are_equal(e, answer) for e in _alternative_forms(expected)))
        or False
    )


def is_prose(answer: str) -> bool:
    """Return True when an answer is a sentence, so that the formulas inside it are not the answer."""
    words = [word for word in _WORD.findall(_MATH.sub(" ", answer)) if word.lower() not in _FILLER]
    return len(words) >= _MIN_PROSE_WORDS or any(form.fullmatch(answer) for form in (_VERDICT, _REASONED_VERDICT))


def _boxed_answer(text: str, otherwise: str | None) -> str | None:
    if BOXED_START not in text:
        return otherwise
    contents = boxed_contents(text)
    return otherwise if contents is None else contents.strip()


def _plain(answer: str) -> str:
    """Return the answer in lower case without white space, LaTeX commands for text and size, and punctuation."""
    if len(answer) > 20 * _MAX_ANSWER_CHARACTERS:
        return ""
    return _NOISE.sub("", _COMMAND.sub("", answer.replace("dfrac", "frac").replace("tfrac", "frac"))).casefold()


def _words(text: str) -> list[str]:
    return _NOISE.sub(" ", _COMMAND.sub("", text)).casefold().split()


def _bracket_depth(answer: str) -> int:
    """Return the maximum bracket depth; the parser's time grows with a power of it."""
    depth = deepest = 0
    for character in answer:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}" and depth:
            depth -= 1
    return deepest


def _is_too_expensive(answer: str) -> bool:
    """Return True when evaluation needs an operation that cannot be interrupted: `9^{9^9}`, `99999999!`."""
    if (
        len(answer) > 2 * _MAX_ANSWER_CHARACTERS
        or _bracket_depth(answer) > _MAX_BRACKET_DEPTH
        or _DIGITS.search(answer)
        or _TOWER.search(answer)
    ):
        return True
    exponents = [int(exponent) for exponent in _POWER.findall(answer)]
    factorials = [int(operand) if operand.isdigit() else _MAX_FACTORIAL + 1 for operand in _FACTORIAL.findall(answer)]
    return max(exponents, default=0) > _MAX_EXPONENT or max(factorials, default=0) > _MAX_FACTORIAL


def _alternative_forms(expected: str) -> list[str]:
    r"""Return the alternative forms of a reference: `x \le 2 : (-\infty, 2]` has two."""
    left, colon, right = expected.strip("$ ").rpartition(":")
    if colon and _RELATION.search(left) and right.strip()[:1] in ("(", "["):
        return [right.strip(), left.strip()]
    return [expected]


def _are_equal(expected: str, answer: str) -> bool:
    reference_values = _parse_reference(expected)
    return bool(reference_values) and bool(
        verify(reference_values, parse(_as_latex(answer), parsing_timeout=None), timeout_seconds=None)
    )


@functools.lru_cache(maxsize=4096)
def _parse_reference(answer: str) -> list[Any]:
    return parse(_as_latex(answer), parsing_timeout=None)  # type: ignore[no-any-return]


def _as_latex(answer: str) -> str:
    return answer if "$" in answer or "\\[" in answer or "\\(" in answer else f"${answer}$"

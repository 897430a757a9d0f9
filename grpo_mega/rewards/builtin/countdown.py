r"""Reward `countdown`: an arithmetic expression over given numbers whose value is the target.

The reference is JSON, `{"target": 98, "numbers": [44, 19, 35]}`. The expression is read from the last
`<answer>...</answer>`, else the last box, else the last line of the answer, without its thought. Expressions that stand
next to each other, and different boxes, are alternatives, of which none counts. What stands behind a `=`, or a number
in front of it, must have the same value. This module evaluates the expression in exact fractions, never Python's eval.
Only whole numbers in ASCII digits, `+ - * /`, their signs `× ÷ −`, `\frac` and brackets are allowed.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from fractions import Fraction

from grpo_mega.rewards.base import reward
from grpo_mega.rewards.final_answers.answer_boxes import find_boxes
from grpo_mega.rewards.final_answers.box_context import read_box
from grpo_mega.rewards.final_answers.hedges import are_adjacent, has_hedge_around, is_denied_behind, visible_answer
from grpo_mega.rewards.final_answers.words_around import words_change_box
from grpo_mega.types import UserError

_MAX_EXPRESSION_CHARACTERS = 300
_MAX_BRACKET_DEPTH = 50
_TOKEN = re.compile(r"\s*(?:([0-9]{1,40})|([-+*/()]))")
_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,40}(?:\.[0-9]{1,40})?\s*")
_RESULT = re.compile(
    r"\s*([-+]?[0-9]{1,40}(?:\.[0-9]{1,40})?)(?![0-9])(?!\s*[-+*/(])(?!.*\b(?:or|not|no|wrong|incorrect)\b)[^0-9]*",
    re.S,
)
_RESULT_BEHIND_BOX = re.compile(r"[ \t$]*=[^\n$]*")
_LEAD_IN = re.compile(
    r"(?:[\s:,]|\*\*|\b(?:so|thus|hence|therefore|the|my|final|correct|answer|solution|expression|equation|is)\b)*",
    re.I,
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_MAX_FRACTION_DEPTH = 5
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_SIGNS = str.maketrans({"×": "*", "⋅": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_LATEX = (
    *(("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\left", ""), ("\\right", ""), ("$", "")),
    *(("\\(", ""), ("\\)", ""), ("\\[", ""), ("\\]", ""), ("`", "")),
)


def check_countdown_args(use_all: bool = True, valid_score: float = 0.0) -> None:
    """Check the arguments of `countdown`.

    Raises:
        UserError: `use_all` is not a boolean, or `valid_score` is not in [0, 1].
    """
    if not isinstance(use_all, bool):
        raise UserError(f"use_all={use_all!r} must be true or false", remedy="use one of them")
    if isinstance(valid_score, bool) or not isinstance(valid_score, int | float) or not 0 <= valid_score <= 1:
        raise UserError(f"valid_score={valid_score!r} is not in [0, 1]", remedy="use for example 0.1")


@reward(low=0.0, high=1.0, check_args=check_countdown_args)
def countdown(prompt: str, completion: str, reference: str, use_all: bool = True, valid_score: float = 0.0) -> float:
    """Return 1 when the expression equals the target, `valid_score` when it only uses the right numbers, else 0.

    Args:
        prompt: if it ends with an opened thought, the completion begins inside of it.
        completion: the expression is extracted from it.
        reference: JSON with `target` and `numbers`, whole numbers.
        use_all: true: each number must be used exactly once; false: at most once.
        valid_score: value of an expression that uses the right numbers but does not equal the target.

    Raises:
        ValueError: the reference is not JSON of this form.
    """
    target, numbers = _parse_task(reference)
    sides = _extract_equation(visible_answer(prompt, completion)).split("=")
    if len(sides) > 1 and _NUMBER.fullmatch(sides[0]) and not _uses(sides[0], numbers, use_all=use_all):
        sides[:2] = sides[1::-1]  # `98 = 44+19+35`
    expression, *results = sides
    if not _uses(expression, numbers, use_all=use_all):
        return 0.0
    value = evaluate(expression)
    if value is None:
        return 0.0
    if value != target:
        return float(valid_score)
    return float(all(_states(result, value) for result in results))


def _uses(expression: str, numbers: Counter[int], *, use_all: bool) -> bool:
    used = Counter(int(token) for token in re.findall(r"[0-9]{1,40}", expression))
    return used == numbers if use_all else bool(used) and not used - numbers


def _states(result: str, value: Fraction) -> bool:
    """Return True if the text behind a `=` is the value with a unit, or is an expression of it, or is empty."""
    number = _RESULT.fullmatch(result)
    return not result.strip() or (Fraction(number[1]) if number is not None else evaluate(result)) == value


def evaluate(expression: str) -> Fraction | None:
    """Return the exact value of an expression, or None when it is malformed or divides by 0."""
    tokens, position = [], 0
    text = expression.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match[1] or match[2])
        position = match.end()
    try:
        value, end = _sum(tokens, 0, 0)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return value if end == len(tokens) else None


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _product(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "+-":
        operand, end = _product(tokens, at + 1, depth)
        value, at = (value + operand if tokens[at] == "+" else value - operand), end
    return value, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _operand(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "*/":
        operand, end = _operand(tokens, at + 1, depth)
        value, at = (value * operand if tokens[at] == "*" else value / operand), end
    return value, at


def _operand(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if depth > _MAX_BRACKET_DEPTH:
        raise ValueError("too deep")
    if tokens[at] in "+-":
        value, end = _operand(tokens, at + 1, depth + 1)
        return (-value if tokens[at] == "-" else value), end
    if tokens[at] != "(":
        return Fraction(int(tokens[at])), at + 1
    value, end = _sum(tokens, at + 1, depth + 1)
    if tokens[end] != ")":
        raise ValueError("not closed")
    return value, end + 1


def _extract_equation(answer: str) -> str:
    """Return the expression of an answer and its results in ASCII signs; empty when it is too long or ambiguous."""
    stated = [(match.start(), match.end(), match[1]) for match in _TAGGED.finditer(answer)] or _boxed(answer)
    if stated:
        start, end, text = stated[-1]
        for before_start, before_end, before in reversed(stated[:-1]):
            if not are_adjacent(answer, before_end, start):
                break
            if "".join(before.split()) != "".join(text.split()):
                return ""
            start = before_start
        if has_hedge_around(answer, start, end) or is_denied_behind(answer, end):
            return ""
    else:
        text = answer[-2 * _MAX_EXPRESSION_CHARACTERS :].rstrip().rpartition("\n")[2]
    boxes = find_boxes(text.strip())
    if len(boxes) == 1 and (boxes[0].start, boxes[0].end) == (0, len(text.strip())):
        text = boxes[0].content or ""  # `<answer>\boxed{..}</answer>`
    return _in_ascii_signs(text.strip()[: 2 * _MAX_EXPRESSION_CHARACTERS])


def _boxed(answer: str) -> list[tuple[int, int, str]]:
    """Return the boxes with the result behind each one; an empty text for boxes that differ and for operands."""
    found: list[tuple[int, int, str]] = []
    for box in find_boxes(answer):
        result = _RESULT_BEHIND_BOX.match(answer, box.end)
        end = box.end if result is None else result.end()
        content = box.content or ""
        text = content + ("" if result is None else result.group().replace("$", ""))
        is_part = read_box(answer, found[-1][1] if found else 0, box.start, end, content).is_part
        is_part = is_part or words_change_box(answer, box.start, end, None)
        found.append((box.start, end, "" if is_part else text))
    return found if len({"".join(text.split()) for _, _, text in found}) <= 1 else [(*found[-1][:2], "")]


def _in_ascii_signs(text: str) -> str:
    """Return an equation without words before it and LaTeX; empty when it is too long or its brackets do not match."""
    for _ in range(_MAX_FRACTION_DEPTH):
        text = _FRACTION.sub(r"((\1)/(\2))", text)
    for latex, plain in _LATEX:
        text = text.replace(latex, plain)
    text = text.strip().removesuffix(".").rstrip()
    lead = _LEAD_IN.match(text)
    if lead is not None:
        text = text[lead.end() :].removesuffix("**" if "**" in lead.group() else "")
    is_readable = len(text) <= _MAX_EXPRESSION_CHARACTERS and _brackets_match(text)
    return text.translate(_SIGNS) if is_readable else ""


def _brackets_match(text: str) -> bool:
    pending: list[str] = []
    for character in text:
        if character in "([":
            pending.append(")" if character == "(" else "]")
        elif character in ")]" and (not pending or pending.pop() != character):
            return False
    return not pending


@functools.lru_cache(maxsize=4096)
def _parse_task(reference: str) -> tuple[int, Counter[int]]:
    try:
        task = json.loads(reference)
        target, numbers = task["target"], task["numbers"]
        whole = all(type(number) is int for number in (target, *numbers))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f'the reference {reference[:80]!r} is not {{"target": .., "numbers": [..]}}; correct the data'
        ) from error
    if not whole or not numbers:
        raise ValueError(
            f"the reference {reference[:80]!r} has a target or numbers that are not whole numbers; correct the data"
        )
    return target, Counter(numbers)

r"""Reward `gsm8k`: the final answer of the completion is numerically equal to that of the reference.

The final answer is the last `#### x`, else the last `\boxed{x}`. Unless `strict`, it may also be the last "answer is
x", else the last number. Answers in a thought do not count. Values are compared exactly, as fractions: 0.5 equals 1/2,
and 33.33 does not equal 100/3. `answer_parsing.py` defines the forms of a number, `number_answers.py` how an answer is
read. An answer that names several numbers (`3 or 4`, adjacent boxes) is right only if the reference names the same.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from grpo_mega.rewards.answer_parsing import (
    SCALES,
    find_boxes,
    find_numbers,
    join_spaced_groups,
    normalize,
    without_box_commands,
)
from grpo_mega.rewards.base import reward
from grpo_mega.rewards.box_context import is_operand_box
from grpo_mega.rewards.number_answers import (
    NO_ANSWER,
    Answer,
    are_adjacent,
    distinct,
    has_hedge_around,
    named_numbers,
    same_answer,
    starts_with_number,
)
from grpo_mega.rewards.prose_numbers import number_in_prose, states_other_number
from grpo_mega.rewards.thought import answer_part
from grpo_mega.types import UserError

MARKER = "####"

_MAX_LINE = 2000
_MAX_STATEMENTS = 64  # markers or boxes that are read, from the end of the text
_TAGS = re.compile(r"</?(?:answer|b|strong|i|em|u|p|br|div|span|center)\s?/?>", re.IGNORECASE)
_SCALE_ASKED = re.compile(r"\b(?:how many|number of|in)\s(dozen|thousand|million|billion|trillion)s?\b", re.IGNORECASE)
_LIST_HEADING = re.compile(r"\s*[*_]*[0-9]{1,2}[.):]\s+[*_]*[A-Za-z]")


@dataclass(frozen=True)
class _Statement:
    """An answer that a marker or a box states. `answer` is None for a box that is not closed."""

    start: int
    end: int
    answer: Answer | None


def check_gsm8k_args(strict: bool = False) -> None:
    """Check the arguments of `gsm8k`.

    Raises:
        UserError: `strict` is not a boolean.
    """
    if not isinstance(strict, bool):
        raise UserError(f"strict={strict!r} must be true or false", remedy="use one of them")


@reward(low=0.0, high=1.0, check_args=check_gsm8k_args)
def gsm8k(prompt: str, completion: str, reference: str, strict: bool = False) -> float:
    """Return 1 when the final answers of completion and reference are numerically equal, else 0.

    Args:
        prompt: an open `<think>` at its end means that the completion begins inside a thought. If it asks for dozens,
            thousands or millions, `4 million` also equals 4.
        completion: the final answer is extracted from it.
        reference: a worked solution that ends in `#### x`, or only the answer.
        strict: accept only `#### x` or a box; a number in prose is not an answer then.

    Raises:
        ValueError: the reference contains no number.
    Source: the answer convention of GSM8K, arXiv:2110.14168.
    Differs: also reads boxes and prose, and compares values instead of strings.
    """
    found = final_answer(answer_part(prompt, completion), strict=strict)
    expected = reference_answer(reference)
    return float(any(same_answer(expected, answer) for answer in (found, *_in_units_of(prompt, found))))


def _in_units_of(prompt: str, answer: Answer) -> list[Answer]:
    """Return a large answer in the dozens, thousands or millions for which the question asks: `4 million` is 4 then."""
    scales = {SCALES[match[1].lower()] for match in _SCALE_ASKED.finditer(prompt)} if answer else set()
    return [tuple(value / scale for value in answer) for scale in scales if min(map(abs, answer)) >= scale]


@functools.lru_cache(maxsize=4096)
def reference_answer(reference: str) -> Answer:
    """Return the numbers that the reference names, at least one.

    Raises:
        ValueError: the reference contains no number.
    """
    answer = final_answer(reference, strict=True) or named_numbers(reference, words_may_lead=True)
    if not answer:
        raise ValueError(
            f"the reference {reference[-80:]!r} does not end in a number; correct the data or its answer_key"
        )
    return answer


def final_answer(text: str, *, strict: bool) -> Answer:
    """Return the numbers that the final answer of `text` names; empty when it has no final answer."""
    text = _TAGS.sub(" ", text)
    markers = _marked_statements(text)
    boxes = _boxed_statements(text, markers)
    if not markers and len(boxes) == 1 and boxes[0].answer is None:
        boxes = []  # an unfinished box: its number is the last one in the text
    statements = sorted([*markers, *boxes], key=lambda statement: statement.start)
    if not statements:
        return NO_ANSWER if strict else number_in_prose(text)
    last = markers[-1] if markers else boxes[-1]
    if markers:
        answer = _joined(text, statements, statements.index(last))
    else:
        answer = _united([box.answer or NO_ANSWER for box in boxes])
        answer = NO_ANSWER if has_hedge_around(text, last.start, last.end) else answer
    return NO_ANSWER if answer and states_other_number(text, last.end, answer) else answer


def _joined(text: str, statements: list[_Statement], chosen: int) -> Answer:
    """Return the numbers of a statement and of those that are adjacent to it, without other text between them."""
    first = last = chosen
    while first > 0 and are_adjacent(text, statements[first - 1].end, statements[first].start):
        first -= 1
    while last + 1 < len(statements) and are_adjacent(text, statements[last].end, statements[last + 1].start):
        last += 1
    if has_hedge_around(text, statements[first].start, statements[last].end):
        return NO_ANSWER
    return _united([statement.answer or NO_ANSWER for statement in statements[first : last + 1]])


def _united(answers: list[Answer]) -> Answer:
    if not all(answers):
        return NO_ANSWER
    if all(same_answer(answers[0], answer) for answer in answers[1:]):
        return answers[0]
    return distinct([values for answer in answers for values in answer])


def _marked_statements(text: str) -> list[_Statement]:
    """Return what each `#### x` states, without markers that are headings or have no answer behind them."""
    found: list[_Statement] = []
    end = len(text)
    while len(found) < _MAX_STATEMENTS and (last := text.rfind(MARKER, 0, end)) >= 0:
        position = last
        while position and text[position - 1] == "#":
            position -= 1
        statement = _marked_statement(text, position, last + len(MARKER), end)
        found += [statement] if statement is not None else []
        end = position
    return found[::-1]


def _marked_statement(text: str, position: int, begin: int, end: int) -> _Statement | None:
    rest = text[begin : min(end, begin + _MAX_LINE)]
    skipped = len(rest) - len(rest.lstrip())
    line, _, below = rest[skipped:].partition("\n")
    is_last_line = not below.strip()
    if _LIST_HEADING.match(line) is not None and not is_last_line:
        return None
    line_end = begin + skipped + len(line)
    line = without_box_commands(line)
    plain = join_spaced_groups(normalize(line))
    if not starts_with_number(line) and not (find_numbers(plain) and ("=" in plain or is_last_line)):
        return None
    return _Statement(position, line_end, named_numbers(line, words_may_lead=is_last_line))


def _boxed_statements(text: str, markers: list[_Statement]) -> list[_Statement]:
    """Return what each box states, without the boxes in the lines of markers."""
    found = []
    lines = iter([(marker.start, marker.end) for marker in markers] + [(len(text), len(text))])
    start, end = next(lines)
    for box in find_boxes(text)[-_MAX_STATEMENTS:]:
        while box.start >= end and end < len(text):
            start, end = next(lines)
        if start <= box.start < end:
            continue
        answer = None if box.content is None else named_numbers(box.content, words_may_lead=True)
        if answer and is_operand_box(text, box.start, box.end, answer[0] if len(answer) == 1 else None):
            answer = NO_ANSWER
        found.append(_Statement(box.start, box.end, answer))
    return found

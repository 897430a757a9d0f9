r"""Reward `gsm8k`: the final answer of the completion is numerically equal to that of the reference.

The final answer is what all `#### x` state, else all `\boxed{x}`. Unless `strict`, it may also be the last "answer is
x", else the last number. `final_answers/finder.py` finds it. Answers in a thought do not count. Values are compared
exactly, as fractions: 0.5 equals 1/2, and 33.33 does not equal 100/3. `answer_parsing.py` defines the forms of a
number, `number_answers.py` how a statement is read. An answer that names several numbers (`3 or 4`, two boxes) is right
only if the reference names the same.
"""

from __future__ import annotations

import functools
import re

from grpo_mega.rewards.answer_parsing import SCALES
from grpo_mega.rewards.base import reward
from grpo_mega.rewards.final_answers.box_context import BoxedAnswer
from grpo_mega.rewards.final_answers.finder import FinalAnswer, Source, find_final_answer
from grpo_mega.rewards.final_answers.hedges import visible_answer
from grpo_mega.rewards.final_answers.statements import tagged_values
from grpo_mega.rewards.final_answers.words_around import words_change_box
from grpo_mega.rewards.last_number import is_denied, last_number
from grpo_mega.rewards.number_answers import (
    NO_ANSWER,
    Answer,
    distinct,
    named_numbers,
    same_answer,
    starts_with_number,
)
from grpo_mega.types import UserError

_TAGS = re.compile(r"</?(?:answer|b|strong|i|em|u|p|br|div|span|center)\s?/?>", re.IGNORECASE)
_MAX_BOX = 2000  # characters
_SCALE_ASKED = re.compile(r"\b(?:how many|number of|in)\s(dozen|thousand|million|billion|trillion)s?\b", re.IGNORECASE)


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
    found = final_answer(visible_answer(prompt, completion), strict=strict, prompt=prompt)
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


def final_answer(text: str, *, strict: bool, prompt: str = "") -> Answer:
    """Return the numbers that the final answer of `text` names; empty when it has no final answer."""
    tagged = tagged_values(text)
    text = _TAGS.sub(" ", text)
    sources: tuple[Source, ...] = ("markers", "boxes") if strict else ("markers", "boxes", "phrases")
    found = find_final_answer(text, sources, boxes_may_be_retracted=False, prompt=prompt)
    if found is None:
        return NO_ANSWER if strict else last_number(text)
    if found.is_vague:
        return NO_ANSWER
    if found.source == "phrases":
        return _phrases(text, found)
    answers = [named_numbers(line.text, words_may_lead=line.is_last) for line in found.lines]
    answer = _united([*answers, *(_boxed(text, box) for box in found.boxes)])
    others = [*(readings[0] for readings in found.readings), *tagged]
    contrary = [named_numbers(other, words_may_lead=False) for other in others]
    return NO_ANSWER if any(other and not same_answer(other, answer) for other in contrary) else answer


def _phrases(text: str, found: FinalAnswer) -> Answer:
    """Return the number that all statements name; without a number in the last one, the last number of the text."""
    sentences = [readings[0] for readings in found.readings]
    if not any(character.isnumeric() for character in sentences[-1]):
        return NO_ANSWER if is_denied(sentences[-1]) else last_number(text)
    answers = [named_numbers(sentence, words_may_lead=not starts_with_number(sentence)) for sentence in sentences]
    is_one = all(same_answer(answer, answers[-1]) for answer in answers if answer)
    return answers[-1] if is_one else NO_ANSWER


def _boxed(text: str, box: BoxedAnswer) -> Answer:
    if box.is_part or len(box.text) > _MAX_BOX:
        return NO_ANSWER
    answer = named_numbers(box.text, words_may_lead=True)
    value = answer[0] if len(answer) == 1 else None
    return NO_ANSWER if words_change_box(text, box.start, box.end, value) else answer


def _united(answers: list[Answer]) -> Answer:
    return distinct([value for answer in answers for value in answer]) if all(answers) else NO_ANSWER

r"""Reward `gsm8k`: the final answer of the completion is numerically equal to that of the reference.

The final answer is the last `#### x`, else the last `\boxed{x}`. Unless `strict`, it may also be the last "answer is
x", else the last number of the completion. Values are compared exactly, as fractions: 0.5 equals 1/2, and 33.33 does
not equal 100/3. `answer_parsing.py` defines the forms of a number. Two alternatives (`#### 3 or 4`) are not an answer.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from grpo_mega.rewards.answer_parsing import (
    BOXED_START,
    are_one_list,
    boxed_contents,
    find_numbers,
    join_spaced_groups,
    normalize,
)
from grpo_mega.rewards.base import reward
from grpo_mega.types import UserError

MARKER = "####"

_WINDOW = 160  # characters read in prose on either side of the last digit; longer than any number
_LEAD_IN = re.compile(
    r"[\s*_$({\[\"':]*(?:(?:so|thus|the|final|correct|answer|is|are|total|=|:)[\s:*]+){0,6}[\s*_$({\[\"']*",
    re.IGNORECASE,
)
_LIST_HEADING = re.compile(r"\s*[*_]*[0-9]{1,2}[.):]\s+[*_]*[A-Za-z]")
_ANSWER_PHRASE = re.compile(
    r"(?:\b(?:the|final)|^\W{0,4})(?:\W{1,4}final| correct)?\s{0,2}answer(?: is\b|:)", re.I | re.M
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
_HEDGES = ("or", "-", "\u2013")
_NO_ANSWER: frozenset[Fraction] = frozenset()


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
        prompt: not used.
        completion: the final answer is extracted from it.
        reference: a worked solution that ends in `#### x`, or only the answer.
        strict: accept only `#### x` or a box; a number in prose is not an answer then.

    Raises:
        ValueError: the reference contains no number.
    Source: the answer convention of GSM8K, arXiv:2110.14168.
    Differs: also reads boxes and prose, and compares values instead of strings.
    """
    expected = reference_values(reference)
    return float(not expected.isdisjoint(final_values(completion, strict=strict)))


@functools.lru_cache(maxsize=4096)
def reference_values(reference: str) -> frozenset[Fraction]:
    """Return the possible values of the reference's answer, at least one.

    Raises:
        ValueError: the reference contains no number.
    """
    values = final_values(reference, strict=True) or _values_of_bare_answer(reference, words_may_lead=True)
    if not values:
        raise ValueError(
            f"the reference {reference[-80:]!r} does not end in a number; correct the data or its answer_key"
        )
    return values


def final_values(text: str, *, strict: bool) -> frozenset[Fraction]:
    """Return the possible values of the final answer of `text`; empty when it has no final answer."""
    marked = _values_after_last_marker(text)
    if marked is not None:
        return marked
    if BOXED_START in text:
        contents = boxed_contents(text)
        if contents is not None:
            return _values_of_bare_answer(contents, words_may_lead=True)
    return _NO_ANSWER if strict else _values_in_prose(text)


def _values_after_last_marker(text: str) -> frozenset[Fraction] | None:
    """Return the values of the last `#### x`; None when every marker is a heading or has no answer behind it."""
    end = len(text)
    while (start := text.rfind(MARKER, 0, end)) >= 0:
        end = start
        if start > 0 and text[start - 1] == "#":
            continue
        rest = text[start + len(MARKER) :][:2000].lstrip("#")
        line, _, below = rest.lstrip().partition("\n")
        if _LIST_HEADING.match(line) is not None and below.strip():
            continue
        answer = _marked_values(line, is_last_line=not below.strip())
        if answer is not None:
            return answer
    return None


def _marked_values(line: str, *, is_last_line: bool) -> frozenset[Fraction] | None:
    plain = join_spaced_groups(normalize(line))
    if _starts_with_number(plain) or (find_numbers(plain) and ("=" in plain or is_last_line)):
        return _values_of_bare_answer(line, words_may_lead=is_last_line)
    return None


def _values_of_bare_answer(text: str, *, words_may_lead: bool) -> frozenset[Fraction]:
    """Return the values of a text that should contain only the answer: a number, then perhaps a unit or a remark."""
    plain = join_spaced_groups(normalize(text)).rpartition("=")[2]
    numbers = find_numbers(plain)
    if not numbers or (len(numbers) > 1 and are_one_list(numbers[0], numbers[1], plain)):
        return _NO_ANSWER
    if _LEAD_IN.fullmatch(plain, 0, numbers[0].start) is None and not (words_may_lead and len(numbers) == 1):
        return _NO_ANSWER
    return numbers[0].values


def _values_in_prose(text: str) -> frozenset[Fraction]:
    """Return the values of the last "answer is x", else of the last number."""
    phrases = [match.end() for match in _ANSWER_PHRASE.finditer(text)]
    if phrases:
        sentence = _SENTENCE_END.split(text[phrases[-1] : phrases[-1] + _WINDOW], maxsplit=1)[0]
        if _starts_with_number(join_spaced_groups(normalize(sentence))):
            return _values_of_bare_answer(sentence, words_may_lead=False)
    if not text.isascii():
        text = normalize(text)
    last = max(text.rfind(digit) for digit in "0123456789")
    if last < 0:
        return _NO_ANSWER
    plain = normalize(text[max(0, last - _WINDOW) : last + _WINDOW])
    numbers = find_numbers(plain, last=2)
    if not numbers or (len(numbers) > 1 and plain[numbers[-2].end : numbers[-1].start].strip(" $") in _HEDGES):
        return _NO_ANSWER
    return numbers[-1].values


def _starts_with_number(plain: str) -> bool:
    numbers = find_numbers(plain)
    return bool(numbers) and _LEAD_IN.fullmatch(plain, 0, numbers[0].start) is not None

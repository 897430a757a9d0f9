r"""Read the numbers that a short text names as its answer: the line after `####`, the content of a box, a sentence.

An answer is a tuple of the named numbers: `72` names one, `3 or 4` names two, and an empty tuple is no answer. What
cannot be read as a number with a unit or a remark is no answer: an unfinished expression, an inequality, a denial, a
second number without a preposition before it.
Asserted by tests/unit/rewards/builtin/test_gsm8k.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from fractions import Fraction

from grpo_mega.rewards.answer_parsing import FoundNumber, find_numbers, join_spaced_groups, normalize
from grpo_mega.rewards.final_answers.denials import is_negated_before
from grpo_mega.rewards.final_answers.words_around import (
    WORDS_BEFORE,
    WORDS_DIRECTLY_BEFORE,
    changes_number_before,
    has_modifier_before,
    is_approximate,
    names_other_number_before,
)

Answer = tuple[Fraction, ...]
NO_ANSWER: Answer = ()

LEAD_IN = re.compile(
    r"[\s*_$({\[\"':]*(?:(?:so|thus|the|final|correct|answer|is|are|total|=|:)[\s:*]+){0,6}[\s*_$({\[\"']*",
    re.IGNORECASE,
)
_LIST_SEPARATOR = re.compile(r"[\s$]*(?:[,;&]|\b(?:or|and|maybe|possibly|perhaps)\b)?[\s$,;]*(?:or|and)?[\s$]*", re.I)
_RANGE_SEPARATOR = re.compile(r"[\s$]*(?:-|\u2013|\u2014|/|:|\bto\b)[\s$]*", re.IGNORECASE)
_WORDS = re.compile(r"[^\\^+*/<>|~!%\u00b1\u221a-\u221c\u2260\u2264-\u2267=]*")
_UNREADABLE = re.compile(  # a condition, a mark of rejection, a stroke, an operator, an equation for a multiple
    r"\A\W*(?:if|suppose|assume|let)\b|[\u0300-\u036f\u20d0-\u20f0\u2717\u2718\u274c\u274e\u26d4\U0001f6ab\U0001f937]"
    r"|[\u4e0d\u975e]\u662f?\s*[0-9]|\A[\s$({\[]*(?:\\(?:times|cdot|div|cup|lor|vee|pi)\b"
    r"|[\u00d7\u22c5\u00b7\u222a\u2228\u2223\u03c0])"
    r"|[!<>~/]=|(?<![0-9A-Za-z])[0-9]*[a-z]\s?/\s?[0-9]+\s?=|(?<![0-9A-Za-z])[0-9]+[a-z]\s?=",
    re.IGNORECASE,
)
_DENIAL = re.compile(rf"\b(?:{WORDS_BEFORE}|over)\b|n't\b", re.IGNORECASE)
_HEDGE_BEFORE = re.compile(
    rf"(?:\b(?:{WORDS_DIRECTLY_BEFORE})\b|n't\b|\\[A-Za-z]+|[-\u2013])[^\w\\]*(?:[^\W\d]+[^\w\\]+)?\Z", re.IGNORECASE
)
_OPERATORS = frozenset("+-\u2013\u2014*/^<>\u00b1\u221a\u221b\u221c\u2260\u2264\u2265\u2266\u2267\u00f7!|")
_DOUBT = re.compile(
    r"\bor\b|[\u2264\u2265\u2260]|<(?![/|]|\w+>)|(?<![\w|/])>|^[A-Za-z]+[0-9]"
    r"|[,;]\s*(?:\\[lc]?dots|\u2026|\.\.\.)|^[\s)\]]*\^|^\s?(?:/(?![A-Za-z]{2}|[hsL]\b)|[+*^\u00b1\u00f7\u2213]"
    r"|[-\u2013\u2014]\s?(?:[A-Za-z](?![A-Za-z])|[\\$0-9]))"
    r"|\b(?:is|was|are)\s*(?:n't|not)\b|\bnot (?:the|correct|right|sure|certain)\b|\b(?:wrong|incorrect|false)\b"
    r"|^\W{0,3}(?:plus|minus|divided|multiplied|squared|cubed|factorial|choose|mod|point)\b|(?:%|\bpercent)\s*of\b"
    r"|\band (?:an?|one|two|three)[ -](?:half|halves|thirds?|fourths?|quarters?|fifths?|sixths?|eighths?|tenths?)\b",
    re.IGNORECASE,
)
QUALIFIER = re.compile(
    r"\b(?:for|in|per|of|after|over|every|each|with|at|on|from|among|by|within|during|as|since|because|not)"
    r"[\s$({\u20ac\u00a3]*(?:(?:the|all|about|only|just)\s)?[\s$]*\Z",
    re.IGNORECASE,
)
_LONE_BEFORE = re.compile(r"[\s$*_:()\[\]]*")
_LONE_BEHIND = re.compile(r"[\s$*_.,;:()\[\]]*(?:\b(?:or|and)\b)?\s*(?:[A-Za-z]\w?)?\s*")  # `41, x` of `x = 41, x = 42`


def named_numbers(text: str, *, words_may_lead: bool) -> Answer:
    """Return the numbers that a text names: one, or several that commas, `or` or `and` join.

    Args:
        text: the answer, perhaps with a unit or a remark behind it, and with an equation before it.
        words_may_lead: accept other words than "the answer is" before the number, if there is only one number.
    """
    if is_approximate(text) or is_unreadable(text):
        return NO_ANSWER
    segments = join_spaced_groups(normalize(text)).split("=")
    plain = segments[-1]
    numbers = find_numbers(plain)
    if not numbers or not _may_lead(plain, numbers, words_may_lead=words_may_lead):
        return NO_ANSWER
    named = [numbers[0]]
    for number in numbers[1:]:
        between = plain[named[-1].end : number.start]
        if _RANGE_SEPARATOR.fullmatch(between):
            return NO_ANSWER
        if not _LIST_SEPARATOR.fullmatch(between):
            break
        named.append(number)
    rest = numbers[len(named) - 1 :]
    for previous, number in itertools.pairwise(rest):
        is_same = number.value is not None and number.value == named[0].value and len(named) == 1
        if not is_same and not QUALIFIER.search(plain[previous.end : number.start]):
            return NO_ANSWER
    if is_doubtful(plain[named[-1].end :], named[-1]):
        return NO_ANSWER
    answer = distinct([number.value for number in named])
    return answer if _agree(segments[:-1], answer) else NO_ANSWER


def is_unreadable(text: str) -> bool:
    """Return True for a condition, and for a text with a mark of rejection or a stroke through its digits."""
    return _UNREADABLE.search(text) is not None


def starts_with_number(text: str) -> bool:
    """Return True if a number comes first in a text, or after words like "the answer is"."""
    plain = join_spaced_groups(normalize(text))
    numbers = find_numbers(plain)
    return bool(numbers) and LEAD_IN.fullmatch(plain, 0, numbers[0].start) is not None


def is_doubtful(tail: str, number: FoundNumber) -> bool:
    """Return True if the text behind a number makes it an alternative, an expression, or denies it."""
    return _DOUBT.search(tail) is not None or changes_number_before(tail, number.value, QUALIFIER)


def is_hedged(before: str) -> bool:
    """Return True if the text before a number makes it an alternative, a bound, an operand, or denies it."""
    left, equals, behind_sign = before.rpartition("=")
    if equals and left[-1:] not in ("!", "<", ">", "~", "/"):
        before = behind_sign  # an equation: the words before its sign describe its left side
        if not before.strip():
            return False
    if has_modifier_before(before):
        return True
    end = before[-60:]
    return _HEDGE_BEFORE.search(end) is not None or is_negated_before(end) or before.rstrip()[-1:] in _OPERATORS


def is_operand(plain: str, number: FoundNumber) -> bool:
    """Return True if the sign of a number is the operator of an expression, as in `n + 5`."""
    sign, before = plain[number.start : number.start + 2], plain[: number.start].rstrip()[-1:]
    return (sign[:1] == "+" or sign in ("- ", "\u2013 ")) and (before.isalnum() or before in (")", "]", "}"))


def distinct(values: Sequence[Fraction | None]) -> Answer:
    """Return the different numbers in their order; no answer if one of them could not be read."""
    read = [value for value in values if value is not None]
    return tuple(dict.fromkeys(read)) if len(read) == len(values) else NO_ANSWER


def same_answer(first: Answer, second: Answer) -> bool:
    """Return True if both name the same numbers, in any order."""
    return bool(first) and set(first) == set(second)


def _may_lead(plain: str, numbers: Sequence[FoundNumber], *, words_may_lead: bool) -> bool:
    first = numbers[0]
    if LEAD_IN.fullmatch(plain, 0, first.start) is not None:
        return True
    before = plain[: first.start]
    return (
        words_may_lead
        and len(numbers) == 1
        and before.rstrip()[-1:] not in (",", "'", "?", ";")
        and not names_other_number_before(before, first.value)
        and _WORDS.fullmatch(before) is not None
        and _DENIAL.search(before) is None
        and not is_operand(plain, first)
        and not is_hedged(before)
    )


def _agree(segments: Sequence[str], answer: Answer) -> bool:
    """Return False if an equation states another number: `41 = 42`."""
    for segment in segments:
        numbers = find_numbers(segment)
        if len(numbers) != 1 or not _LONE_BEFORE.fullmatch(segment, 0, numbers[0].start):
            continue
        if not _LONE_BEHIND.fullmatch(segment, numbers[0].end):
            continue
        if len(answer) != 1 or numbers[0].value != answer[0]:
            return False
    return True

"""Read the last number of a text without a marker, a box and an "answer is x".

Two last lines that differ only in their number name no answer: `x = 4`, `x = 5`.
Asserted by tests/unit/rewards/builtin/test_gsm8k.py and test_gsm8k_attacks.py.
"""

from __future__ import annotations

import re

from grpo_mega.rewards.answer_parsing import FoundNumber, find_numbers, normalize
from grpo_mega.rewards.final_answers.alternatives import value_of_same_name_before
from grpo_mega.rewards.final_answers.hedges import ADMITTED_IGNORANCE, is_rejected
from grpo_mega.rewards.final_answers.words_around import (
    WORDS_BEFORE,
    has_modifier_before,
    is_approximate_before,
    is_continued,
    is_unfinished,
    names_other_number_before,
)
from grpo_mega.rewards.number_answers import (
    NO_ANSWER,
    QUALIFIER,
    Answer,
    distinct,
    is_doubtful,
    is_hedged,
    is_operand,
    is_unreadable,
)

_WINDOW = 160  # characters read in prose on either side of the last digit; longer than any number
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
_SENTENCE_START = re.compile(r".*(?:\n|[.!?]\s)", re.DOTALL)
_LIST_BEFORE = re.compile(
    r"[0-9][\s$]*(?:[-\u2013\u2014,;/:&\u2192\u21d2]|[-=]>|\band\b|\bto\b)?[\s$]*\Z|[0-9,][\s$,]*(?:\.\.\.|\u2026|\\[lc]?dots)[\s$,]*\Z",
    re.IGNORECASE,
)
_COMPOUND_BEFORE = re.compile(  # `5 hours and 30 minutes`
    r"[0-9][\s$%]*(?!(?:is|are|was|were|equals?|gives?|makes?|leaves?|has|have|gets?|so|then"
    r"|means?)\b)[A-Za-z]{1,20}\.?"
    r"\s*(?:,|&|\+|\band\b)?[\s$]*\Z",
    re.IGNORECASE,
)
_JOINED_EQUATION = re.compile(
    r"[0-9]\s*\bor\b(?:\s+(?:was|is|it|maybe|perhaps|rather|the|an?))*[\s$]*\Z"
    r"|[0-9][^.\n0-9]{0,20}\bor\b[^.\n0-9]{0,20}=[\s$]*\Z",
    re.IGNORECASE,
)  # x = 4 or x = 5
_IGNORANCE = re.compile(ADMITTED_IGNORANCE, re.IGNORECASE)
_DENIED = re.compile(rf"\b(?:{WORDS_BEFORE})\b|n't\b", re.IGNORECASE)
_LABELED = re.compile(r"\b(?!(?:is|are|was|be|equals|answer|total)\b)[A-Za-z]{2,}\s+\(\s*\Z", re.IGNORECASE)
_DIGITS = re.compile(r"[0-9][0-9.,/]*")
_SHORT_STATEMENT = 12  # characters: `x = 5`, `Answer: 5`


def is_denied(sentence: str) -> bool:
    """Return True if words like "unknown" or "cannot" make a sentence without a number no answer."""
    return _DENIED.search(sentence) is not None


def last_number(text: str) -> Answer:
    """Return the last number of a text; empty if it is not one clear answer."""
    raw = text
    if not text.isascii():
        text = normalize(text)
        digits = [position for position, character in enumerate(raw[-4 * _WINDOW :]) if character.isdecimal()]
        raw = raw[-4 * _WINDOW :][: digits[-1] + 1] if digits else raw
    last = max(text.rfind(digit) for digit in "0123456789")
    if last < 0:
        return NO_ANSWER
    if is_approximate_before((raw if raw is not text and not raw.isascii() else text[: last + 1])[-_WINDOW:]):
        return NO_ANSWER
    plain = normalize(text[max(0, last - _WINDOW) : last + _WINDOW])
    numbers = find_numbers(plain, last=1)
    if not numbers:
        return NO_ANSWER
    number = numbers[-1]
    before = _SENTENCE_START.sub("", plain[: number.start])
    behind = _SENTENCE_END.split(plain[number.end :], maxsplit=1)[0]
    following = plain[number.end + len(behind) :]
    if is_rejected(behind) or is_rejected(following) or _IGNORANCE.search(text[-4 * _WINDOW :]) is not None:
        return NO_ANSWER
    if is_hedged(before) or is_operand(plain, number) or is_doubtful(behind, number):
        return NO_ANSWER
    if is_unfinished(plain, number.end) or is_continued(plain, number.end + len(behind)):
        return NO_ANSWER
    if plain.startswith("?", number.end + len(behind)) or _is_label(before):
        return NO_ANSWER
    if has_modifier_before(plain[: number.start]) or names_other_number_before(
        before, number.value, only_adjacent=True
    ):
        return NO_ANSWER
    if is_unreadable(f"{before}0{behind}"):
        return NO_ANSWER
    if _LIST_BEFORE.search(before) or _COMPOUND_BEFORE.search(before) or _JOINED_EQUATION.search(before):
        return NO_ANSWER
    if value_of_same_name_before(before) is not None:
        return NO_ANSWER
    if QUALIFIER.search(before) and _DIGITS.search(before):
        return NO_ANSWER  # `72 apples after 3 days`
    return NO_ANSWER if _repeats_statement(plain, before, number, behind) else distinct([number.value])


def _is_label(before: str) -> bool:
    """Return True for a number in brackets behind a word: `equation (5)`, but not `five (5)` and `it is (5)`."""
    return _LABELED.search(before) is not None and not names_other_number_before(before, None, only_adjacent=True)


def _repeats_statement(plain: str, before: str, number: FoundNumber, behind: str) -> bool:
    """Return True if the sentence before the last has the same words and another number: `x = 4`, `x = 5`."""
    own = _skeleton(f"{before}0{behind}")
    earlier = [part for part in _SENTENCE_END.split(plain[: number.start - len(before)]) if part.strip()]
    for part in earlier if len(own) <= _SHORT_STATEMENT else earlier[-1:]:
        numbers = find_numbers(part)
        if len(numbers) == 1 and numbers[0].value != number.value:
            other = f"{part[: numbers[0].start]}0{part[numbers[0].end :]}"
            if _skeleton(other) == own:
                return True
    return False


def _skeleton(sentence: str) -> str:
    """Return a sentence in lower case, without punctuation."""
    return " ".join(re.sub(r"[^\w=+*/#-]+", " ", sentence).split()).lower()

"""Find the number that a text without a marker and without a box names as its answer.

It is the number of the last "the answer is x", else the last number. Two such statements with different numbers name no
answer, unless a correction stands between them ("The answer is 4. Wait, no. The answer is 5").
Asserted by tests/unit/rewards/builtin/test_gsm8k.py and test_gsm8k_attacks.py.
"""

from __future__ import annotations

import itertools
import re

from grpo_mega.rewards.answer_parsing import FoundNumber, find_numbers, normalize
from grpo_mega.rewards.answer_words import (
    WORDS_BEFORE,
    has_short_form_before,
    is_approximate_before,
    names_other_number_before,
)
from grpo_mega.rewards.number_answers import (
    NO_ANSWER,
    QUALIFIER,
    Answer,
    distinct,
    has_hedge_around,
    is_doubtful,
    is_hedged,
    is_operand,
    named_numbers,
    same_answer,
    starts_with_number,
)

_WINDOW = 160  # characters read in prose on either side of the last digit; longer than any number
_MAX_PHRASES = 16
_ANSWER_PHRASE = re.compile(
    r"(?:\b(?:the|final)|^\W{0,4})(?:\W{1,4}final| correct)?\s{0,2}answer(?: is\b|:)", re.I | re.M
)
_NEXT_QUESTION = re.compile(r"\n\W*(?:Q|Question|Problem|User|Human|Instruction)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
_SENTENCE_START = re.compile(r".*(?:\n|[.!?]\s)", re.DOTALL)
_LIST_BEFORE = re.compile(r"[0-9][\s$]*(?:[-\u2013\u2014,;/:&]|\band\b|\bto\b)?[\s$]*\Z", re.IGNORECASE)
_COMPOUND_BEFORE = re.compile(  # `5 hours and 30 minutes`
    r"[0-9][\s$%]*(?!(?:is|are|was|were|equals?|gives?|makes?|leaves?|has|have|gets?|so|then|means?)\b)[A-Za-z]{1,20}\.?"
    r"\s*(?:,|&|\+|\band\b)?[\s$]*\Z",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:no|not|wait|wrong|incorrect|mistake|error|correction|actually|instead|sorry|recheck\w*)\b|n't\b",
    re.IGNORECASE,
)
_DENIED = re.compile(rf"\b(?:{WORDS_BEFORE})\b|n't\b", re.IGNORECASE)
_DIGITS = re.compile(r"[0-9][0-9.,/]*")
_SHORT_STATEMENT = 12  # characters: `x = 5`, `Answer: 5`


def number_in_prose(text: str) -> Answer:
    """Return the number of the last "answer is x", else the last number; empty if it is not one clear answer."""
    phrases = list(_ANSWER_PHRASE.finditer(text))[-_MAX_PHRASES:]
    if phrases:
        stated = [_statement_behind(text, match.start(), match.end()) for match in phrases]
        last = stated[-1]
        if last is not None:
            begin = phrases[-1].start()
            for match, answer in zip(phrases[-2::-1], stated[-2::-1], strict=True):
                if _CORRECTION.search(text, match.end(), begin):
                    break
                if answer is not None and not same_answer(answer, last):
                    return NO_ANSWER
            return last
    return _last_number(text)


def states_other_number(text: str, position: int, answer: Answer) -> bool:
    """Return True if "the answer is x" stands behind `position` with another number, before a next question."""
    end = _NEXT_QUESTION.search(text, position)
    last = len(text) if end is None else end.start()
    for match in itertools.islice(_ANSWER_PHRASE.finditer(text, position, last), _MAX_PHRASES):
        stated = _statement_behind(text, match.start(), match.end())
        if stated and not same_answer(stated, answer):
            return True
    return False


def _statement_behind(text: str, begin: int, end: int) -> Answer | None:
    """Return what the sentence behind "the answer is" names; None if it names nothing, also not in words."""
    rest = text[end : end + _WINDOW]
    skipped = len(rest) - len(rest.lstrip(" \t\n*:_"))
    sentence = _SENTENCE_END.split(rest[skipped:], maxsplit=1)[0]
    if not any(character.isnumeric() for character in sentence):
        return NO_ANSWER if _DENIED.search(sentence) else None
    if has_hedge_around(text, begin, end + skipped + len(sentence)):
        return NO_ANSWER
    return named_numbers(sentence, words_may_lead=not starts_with_number(sentence))


def _last_number(text: str) -> Answer:
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
    if is_hedged(before) or is_operand(plain, number) or is_doubtful(behind, number):
        return NO_ANSWER
    if has_short_form_before(plain[: number.start]) or names_other_number_before(
        before, number.value, only_adjacent=True
    ):
        return NO_ANSWER
    if _LIST_BEFORE.search(before) or _COMPOUND_BEFORE.search(before):
        return NO_ANSWER
    if QUALIFIER.search(before) and _DIGITS.search(before):
        return NO_ANSWER  # `72 apples after 3 days`
    return NO_ANSWER if _repeats_statement(plain, before, number, behind) else distinct([number.value])


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

"""Recognize words and gaps that make several statements one list of answers, or one statement an alternative."""

from __future__ import annotations

import re

_GAP_OF_LIST = re.compile(
    r"(?:[\s$*_,;.:&/|()\[\]\\#]|\b(?:or|and|maybe|perhaps|possibly|also|alternatively)\b)*", re.I
)
_GAP_WITH_HEDGE = re.compile(
    r"[^\n]{0,40}?\b(?:or|maybe|perhaps|possibly|alternatively|might|could|either)\b[^\n]{0,40}\Z", re.IGNORECASE
)
_HEDGE_BEHIND = re.compile(r"[\s$.,;:?!)\]*_]*(?:or|alternatively|maybe|perhaps|possibly)\b", re.IGNORECASE)
_HEDGE_BEFORE_STATEMENT = re.compile(
    r"(?:\b(?:or|maybe|perhaps|possibly|alternatively)[\s$*_:({\[]*|\bnot[ $*_:({\[]*|\d\s*\|[\s$]*)\Z", re.IGNORECASE
)

_RETRACTION = re.compile(
    r"\b(?:no\b(?=\s*[,.:!;])|wait|actually|correction|corrected|mistake|an error|oops|sorry|was wrong|is wrong"
    r"|is incorrect|was incorrect|not correct|not right|recheck|re-check|on second thought|let me redo)",
    re.IGNORECASE,
)
_HEDGE_WORD = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|alternatively|either|could|might|option|both)\b", re.IGNORECASE
)
_DENIED_BEHIND = re.compile(
    r"\b(?:wrong|incorrect|false|not (?:correct|right|true|sure|certain|the answer)|unsure|kidding|joking|mistaken)\b",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"\b(?:not|never|neither|nor|if|suppose|assume|let|half of|twice|double|minus|about|approximately|around|roughly"
    r"|at (?:least|most)|between|(?:more|less|fewer|greater|larger|smaller) than)\b|n't\b"
    r"|(?:[-+/^~=<>({\u2248\u2264\u2265]|\d)\s*\Z",
    re.IGNORECASE,
)
_SENTENCE_START = re.compile(r".*(?:[.!?][\s*_]|[\n:;])", re.DOTALL)
_STRUCK_OUT = re.compile(r"~~.{1,400}?~~|<(del|s|strike)>.{0,400}?</\1>|<!--.{0,2000}?-->", re.DOTALL | re.IGNORECASE)
_BEHIND = 200  # characters


def without_struck_out(text: str) -> str:
    """Return a text without what Markdown or HTML strikes out or hides: `~~5~~`, `<del>5</del>`, comments."""
    return _STRUCK_OUT.sub(" ", text) if "~~" in text or "<" in text else text


def is_denied_behind(text: str, end: int) -> bool:
    """Return True if the text behind a statement takes it back or doubts it."""
    behind = text[end : end + _BEHIND]
    return _DENIED_BEHIND.search(behind) is not None or _RETRACTION.search(behind) is not None


def is_denied_before(text: str, start: int) -> bool:
    """Return True if the sentence before a statement denies it, limits it, or makes it an operand."""
    sentence = _SENTENCE_START.sub("", text[max(0, start - _BEHIND) : start])
    return _DENIED_BEFORE.search(sentence) is not None


def are_adjacent(text: str, end: int, start: int) -> bool:
    """Return True if the text between two statements of an answer makes them one list.

    Args:
        text: contains both statements.
        end: end of the first statement.
        start: start of the second statement.
    """
    gap = text[end : min(start, end + 200)]
    is_whole = start - end <= len(gap)
    return is_whole and bool(_GAP_OF_LIST.fullmatch(gap) or _GAP_WITH_HEDGE.match(gap))


def has_hedge_around(text: str, start: int, end: int) -> bool:
    """Return True if words directly before or behind text[start:end] offer an alternative to it or deny it."""
    before = text[max(0, start - 40) : start]
    return _HEDGE_BEFORE_STATEMENT.search(before) is not None or _HEDGE_BEHIND.match(text, end) is not None


def is_retraction(between: str) -> bool:
    """Return True if the text between two statements takes back the first one, and offers no alternative."""
    return _RETRACTION.search(between) is not None and _HEDGE_WORD.search(between) is None

"""Recognize words and gaps that make several statements one list of answers, or one statement an alternative."""

from __future__ import annotations

import re

from grpo_mega.rewards.final_answers.words_around import ESTIMATE, is_continued

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

RETRACTION = re.compile(
    r"\b(?:no\b(?=\s*[,.:!;])|wait|actually|correction|corrected|mistake|an error|oops|sorry|was wrong|is wrong"
    r"|is incorrect|was incorrect|not correct|not right|(?:wrong|incorrect)(?=\s*[,.:!;])|recheck|re-check"
    r"|on second thought|scratch that|let me redo)",
    re.IGNORECASE,
)
"""Words that take back what stands before them."""
_HEDGE_WORD = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|alternatively|either|could|might|option|both)\b", re.IGNORECASE
)
_REJECTION = re.compile(
    r"\b(?:wrong|incorrect|false|not (?:correct|right|true|sure|certain|the answer)|unsure|kidding|joking|mistaken)\b"
    r"|\b(?:could|might|may)(?: also| well)? be\s+\$?[-\d\\]",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    rf"\b(?:not|never|neither|nor|if|suppose|assume|let|half of|twice|double|minus|{ESTIMATE}"
    r"|at (?:least|most)|between|(?:more|less|fewer|greater|larger|smaller) than)\b|n't\b"
    r"|(?:[-+/^~=<>({\u2248\u2264\u2265]|\d)\s*\Z",
    re.IGNORECASE,
)
_SENTENCE_START = re.compile(r".*(?:[.!?][\s*_]|[\n:;])", re.DOTALL)
_STRUCK_OUT = (  # opening, closing, most characters between them
    *((f"<{name}>", f"</{name}>", 400) for name in ("del", "s", "strike")),
    ("<!--", "-->", 2000),
    ("~~", "~~", 400),
)
_BEHIND = 200  # characters


def without_struck_out(text: str) -> str:
    """Return a text without what Markdown or HTML strikes out or hides: `~~5~~`, `<del>5</del>`, comments.

    It takes linear time for any text: each closing mark is searched once.
    """
    if "~~" not in text and "<" not in text:
        return text
    for opening, closing, most in _STRUCK_OUT:
        text = _without_pairs(text, opening, closing, most)
    return text


def _without_pairs(text: str, opening: str, closing: str, most: int) -> str:
    lower = text.lower()
    lower = lower if len(lower) == len(text) else text  # a letter whose lower case is longer
    kept: list[str] = []
    position, start = 0, lower.find(opening)
    end = -1
    while start >= 0:
        content = start + len(opening)
        if end < content + (opening == closing):
            end = lower.find(closing, content + (opening == closing))
        if end < 0:
            break
        if end - content <= most:
            kept += [text[position:start], " "]
            position = end + len(closing)
        start = lower.find(opening, max(position, start + 1))
    return "".join([*kept, text[position:]])


def is_denied_behind(text: str, end: int) -> bool:
    """Return True if the text behind a statement takes it back or doubts it."""
    behind = text[end : end + _BEHIND]
    return is_rejected(behind) or RETRACTION.search(behind) is not None or is_continued(behind, 0)


def is_rejected(text: str) -> bool:
    """Return True if a text says that something is wrong, or not sure."""
    return _REJECTION.search(text) is not None


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
    return RETRACTION.search(between) is not None and _HEDGE_WORD.search(between) is None

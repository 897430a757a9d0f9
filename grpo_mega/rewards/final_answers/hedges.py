"""Recognize words and gaps that make several statements one list of answers, or one statement an alternative."""

from __future__ import annotations

import re

from grpo_mega.rewards.final_answers.words_around import ESTIMATE, is_continued
from grpo_mega.rewards.thought import answer_part

_GAP_OF_LIST = re.compile(
    r"(?:[\s$*_,;.:&/|()\[\]\\#]|\b(?:or|and|maybe|perhaps|possibly|also|alternatively)\b)*", re.I
)
_GAP_WITH_HEDGE = re.compile(
    r"[^\n]{0,40}?\b(?:or|maybe|perhaps|possibly|alternatively|might|could|either)\b[^\n]{0,40}\Z", re.IGNORECASE
)
_HEDGE_BEHIND = re.compile(
    r"[\s$.,;:?!)\]*_]*(?:(?:but|though|although|and|well|h+m+)\b[\s.,]*)?(?:or|alternatively|maybe|perhaps"
    r"|possibly)\b",
    re.IGNORECASE,
)
_HEDGE_BEFORE_STATEMENT = re.compile(
    r"(?:\b(?:or|maybe|perhaps|possibly|alternatively)[\s$*_:({\[]*|\bnot[ $*_:({\[]*|\d\s*\|[\s$]*)\Z", re.IGNORECASE
)

RETRACTION = re.compile(
    r"\b(?:no\b(?=\s*[,.:!;])|wait|actually|correction|corrected|(?<!\bno )(?<!without )mistake|an error|oops|sorry"
    r"|was wrong|is wrong"
    r"|is incorrect|was incorrect|not correct|not right|(?:wrong|incorrect)(?=\s*[,.:!;)])|recheck|re-check"
    r"|on second thought|scratch that|let me redo)",
    re.IGNORECASE,
)
"""Words that take back what stands before them."""
ADMITTED_IGNORANCE = (
    r"\bI(?: really| honestly)? (?:do not|don't|did not|didn't) know(?=\s*(?:the answer|it|this)?\s*(?:[.!,;:\n]|\Z))"
    r"|\bI(?:'m| am)? (?:cannot|can't|can not|could not|couldn't|unable to) (?:solve|answer|determine|work|find"
    r"|figure)\b"
)
"""A sentence that says that the answer is not known or was not found, as a pattern for texts in any case."""
_HEDGE_WORD = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|alternatively|either|could|might|option|both)\b", re.IGNORECASE
)
_REJECTION = re.compile(
    r"\b(?:wrong|incorrect|false|not (?:correct|right|true|sure|certain|the answer)|unsure|kidding|joking|mistaken)\b"
    r"|\bnot (?:(?:the|an?|my|really|quite|actually) ){1,3}(?:right|correct|true|real|final|actual|proper|valid"
    r"|answer|result|solution)\b"
    r"|\bnever ?mind\b|\b(?:disregard|ignore) (?:that|this|it|(?:the|my) (?:above|previous|box|answer))\b|\bno idea\b"
    r"|\bnot it\b(?=\s*(?:[.!,;:\n]|\Z))|\b(?:found|find|have|know|see|is|was) no answer\b"
    r"|\b(?:cannot|can't|can not|could not|couldn't|unable to|failed to) (?:solve|answer|verify|confirm|determine"
    r"|be (?:(?:the|an?|my|our) )?(?:right|correct|true|answer|solution|result|case))\b"
    r"|\b(?:do not|don't|did not|didn't) (?:know|believe|trust|think so)\b|\b(?:a|my|wild|random|only|just"
    r"|pure) guess\b"
    r"|\b(?:isn't|wasn't|ain't) (?:(?:the|an?|really|quite) )*(?:right|correct|true|answer|it)\b"
    rf"|{ADMITTED_IGNORANCE}"
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
    ("\\begin{comment}", "\\end{comment}", 2000),
    ("\\iffalse", "\\fi", 2000),
    ("~~", "~~", 400),
)
_BEHIND = 200  # characters


def visible_answer(prompt: str, completion: str) -> str:
    """Return a completion without its thoughts, what it strikes out, and its comments."""
    return without_struck_out(answer_part(prompt, completion))


def without_struck_out(text: str) -> str:
    """Return a text without what Markdown, HTML or LaTeX strikes out or hides: `~~5~~`, `<del>5</del>`, comments.

    It takes linear time for any text: each closing mark is searched once.
    """
    if not any(mark in text for mark in ("~~", "<", "\\iffalse", "\\begin{comment}")):
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

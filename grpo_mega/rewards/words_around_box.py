r"""Recognize words and signs around a box that change the number in it: `half of \boxed{5}`, `\boxed{5} dozen`.

Formulas around a box are read by `final_answers/box_context.py`.
Asserted by tests/unit/rewards/builtin/test_gsm8k_attacks.py.
"""

from __future__ import annotations

import re
from fractions import Fraction

from grpo_mega.rewards.answer_parsing import normalize
from grpo_mega.rewards.answer_words import (
    WORDS_DIRECTLY_BEFORE,
    changes_by_sign_or_word,
    changes_number_before,
    has_short_form_before,
    names_other_number_before,
)

_WINDOW = 80
_MATH_OPENED = re.compile(r"(?:\$|\\\(|\\\[|\\displaystyle\b|\s)*\Z")
_ESTIMATE_BEFORE = re.compile(r"[~\u2248\u2245\u2243\u223c\u2213\u00ac]\Z")
_CLAUSE_END = re.compile(r"[=.;,\n]|\b(?:because|since|as|so|which|where|for|when|if|and)\b", re.IGNORECASE)
_SECOND = re.compile(
    r"[\s$*]*(?:"
    r"[,/:&|\u2192~\u2245\u223c\u2261%]|->|=>|\+/-|\b(?:and|or|to|vs\.?|versus|becomes|rounds? to|rounded to)\b)"
    r"[\s$*(]*(?:about )?(?:[0-9]|(?:zero|one|two|three|four|five|six|seven|eight|nine|ten)\b)"
    r"|\s*\W?\s*(?:is(?:n't| not)|was not|not\W*\Z|wrong|false|incorrect|invalid|[(]mod|hundred|thousand|base)\b"
    r"|\s*[\u2032'][0-9]|\s*-?to-",
    re.IGNORECASE,
)
_QUALIFIED = re.compile(r"\b(?:for|in|per|of|after|every|each|with|at|on|from|among|by|during|the)\s+\Z", re.IGNORECASE)
_NUMBER_BEHIND = re.compile(
    r"\s*(?:(?!(?:for|in|per|of|after|over|every|each|with|at|on|from|among|by|within|during|out)\b)[A-Za-z(]+\s)?[(]?[0-9]"
)
_SENTENCE_START = re.compile(r"[.!?](?:\s|\Z)|\n")
_DENIED_LINE = re.compile(r"(?:\b(?:not|never|cannot be|than|twice|half of|minus)|n't)[\s:]*\Z", re.IGNORECASE)
_WORD_BEFORE = re.compile(
    rf"(?:\b(?:{WORDS_DIRECTLY_BEFORE})\b|n't\b)[^\w\\]*(?:(?:the|an?|of)\b[^\w\\]*){{0,2}}\Z", re.IGNORECASE
)


def words_change_box(text: str, start: int, end: int, value: Fraction | None) -> bool:
    r"""Return True if words or signs around the box text[start:end] change its number, deny it, or estimate it.

    Args:
        text: contains the box.
        start: first position of the box.
        end: first position behind the box.
        value: the number that the box names; the text may repeat it in words, as in `\boxed{5} (five)`.
    """
    before, behind = text[max(0, start - _WINDOW) : start], text[end : end + _WINDOW]
    return _change_before(before, value) or _change_behind(behind, value)


def _change_before(before: str, value: Fraction | None) -> bool:
    outside = _MATH_OPENED.sub("", before)
    sentence = _SENTENCE_START.split(before)[-1]
    return (
        _DENIED_LINE.search(outside) is not None
        or _ESTIMATE_BEFORE.search(outside) is not None
        or _WORD_BEFORE.search(sentence) is not None
        or has_short_form_before(sentence)
        or names_other_number_before(sentence, value, only_adjacent=True)
    )


def _change_behind(behind: str, value: Fraction | None) -> bool:
    tail = normalize(behind.partition("\n")[0])
    is_math_ended = re.match(r"\s*(?:\$|\\\)|\\\])", behind) is not None
    tail = re.sub(r"\A[\s$]+", " ", tail)
    if is_math_ended and re.match(r"\s*[!]", tail):
        return False
    clause = _CLAUSE_END.split(tail, maxsplit=1)[0]
    second = changes_by_sign_or_word(tail) or _SECOND.match(tail) is not None
    return second or changes_number_before(clause, value, _QUALIFIED) or _NUMBER_BEHIND.match(clause) is not None

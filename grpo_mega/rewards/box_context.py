r"""Recognize a box that is an operand: in `$2\boxed{5}$` and `\frac{1}{\boxed{5}}` the answer is not 5.

Asserted by tests/unit/rewards/builtin/test_gsm8k_attacks.py.
"""

from __future__ import annotations

import re
from fractions import Fraction

from grpo_mega.rewards.answer_parsing import joins_number, normalize
from grpo_mega.rewards.answer_words import (
    WORDS_DIRECTLY_BEFORE,
    changes_by_sign_or_word,
    changes_number_before,
    has_short_form_before,
    names_other_number_before,
)

_WINDOW = 80
_MATH_OPENED = re.compile(r"(?:\$|\\\(|\\\[|\\displaystyle\b|\s)*\Z")
_OPERATOR_BEFORE = re.compile(
    r"(?:[-+*/^_\u00d7\u00f7\u00b1\u2212\u2013\u2044\u221a\u221b<>\u2260\u2264\u2265|~\u2248\u2245\u2243\u223c\u2213\u00ac]|[(\[]\s*[-+])\Z"
)
_EMPHASIS = re.compile(r"(?:\*\*|__)\Z")
_FONT = re.compile(
    r"\\(?:text\w*|math\w+|bm|bf|boldsymbol|underline|fbox|color|textcolor|large|Large|huge|Huge|centering)\s*"
    r"(?:\{[A-Za-z]*\})?\s*\{\Z"
)
_WORDS_IN_MATH = re.compile(r"\\(?:text\w*|mbox|mathrm)\s*\{[^{}]*\}\Z")
_COMMAND = re.compile(r"\\([A-Za-z]+)\Z")
_HARMLESS_COMMANDS = frozenset(("quad", "qquad", "implies", "Rightarrow", "rightarrow", "Longrightarrow", "therefore"))
_HARMLESS_COMMANDS |= {"to", "displaystyle", "left", "equiv", "newline", "par"}
_OPERAND = re.compile(r"(?:[0-9.,!%)\]\u00b0\u00b2\u00b3\u03c0]|(?<![A-Za-z'])(?!a\b)[A-Za-z])\Z")
_MARKED_ITEM = re.compile(r"(?:^|\n)\s*(?:[0-9]{1,2}|[A-Za-z])[.)]\Z")
_SENTENCE_END = re.compile(r"[.,!)\]%]\s+[$\s*]*\Z")
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


def is_operand_box(text: str, start: int, end: int, value: Fraction | None = None) -> bool:
    r"""Return True if the text around the box text[start:end] makes it a part of an expression or denies it.

    Args:
        text: contains the box.
        start: first position of the box.
        end: first position behind the box.
        value: the number that the box names; the text may repeat it in words, as in `\boxed{5} (five)`.
    """
    before, behind = text[max(0, start - _WINDOW) : start], text[end : end + _WINDOW]
    return _changes_before(before, value) or _changes_behind(behind, value)


def _changes_before(before: str, value: Fraction | None) -> bool:
    outside = _MATH_OPENED.sub("", before)
    sentence = _SENTENCE_START.split(before)[-1]
    if _DENIED_LINE.search(outside) is not None:
        return True
    if _WORD_BEFORE.search(sentence) is not None or has_short_form_before(sentence):
        return True
    if names_other_number_before(sentence, value, only_adjacent=True):
        return True
    if _EMPHASIS.search(outside):
        outside = outside[:-2].rstrip()
    if _OPERATOR_BEFORE.search(outside) is not None:
        return True
    if outside.endswith("{"):
        return _FONT.search(outside) is None
    if outside.endswith("}"):
        is_end = "\\end" in outside[outside.rfind("\\") :] or "$" in before[len(outside) :]
        return not is_end and _WORDS_IN_MATH.search(outside) is None
    command = _COMMAND.search(outside)
    if command is not None:
        return command[1] not in _HARMLESS_COMMANDS
    if _OPERAND.search(outside) is None or "\n" in before[len(outside) :] or _MARKED_ITEM.search(outside):
        return False
    return _SENTENCE_END.search(before[len(outside) - 1 :]) is None


def _changes_behind(behind: str, value: Fraction | None) -> bool:
    tail = normalize(behind.partition("\n")[0])
    if joins_number(tail):
        return True
    is_math_ended = re.match(r"\s*(?:\$|\\\)|\\\])", behind) is not None
    tail = re.sub(r"\A[\s$]+", " ", tail)
    if is_math_ended and re.match(r"\s*[!]", tail):
        return False
    clause = _CLAUSE_END.split(tail, maxsplit=1)[0]
    second = changes_by_sign_or_word(tail) or _SECOND.match(tail) is not None
    return second or changes_number_before(clause, value, _QUALIFIED) or _NUMBER_BEHIND.match(clause) is not None

r"""Recognize other values that the text around a box offers next to the value in it.

- A value that the text behind the box calls valid as well: `\boxed{4}, though 5 also works`.
- Cases: `\boxed{4} for even n, 5 for odd n`.
- A value that ends a clause behind the box: `if that fails, try 5`, `i.e. 5`. Operands, results of equations, numbers
  behind a preposition or before a unit, and sentences that check or give a reason do not count.
- A value that the text behind the box names as its last word: `Other solution: 5`, `Edit: it is 5`.
- A value that `and` joins to the box: `7 and \boxed{4}`, and another value of the same name: `x = 3, x = \boxed{4}`.

A value that equals the content of the box is no other value. Only a short text around the box is searched.
Asserted by tests/unit/rewards/final_answers/test_alternatives.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from grpo_mega.rewards.final_answers.statements import NEXT_QUESTION
from grpo_mega.rewards.math_answers.equality import is_right

_WINDOW = 240  # characters behind a box
_VALUE = r"(\$[^$\n]{1,80}\$|-?\d+(?:[.,/]\d+)*)"
_CASE = r"(?:for|when|if|where|otherwise|else)\b"
_CALLED_VALID = re.compile(
    rf"(?:[.;,:(\[\n]|\b(?:and|but|though|although|while)\b)[\s*(\[]*{_VALUE}[\s,]*"
    r"(?:(?:is|are|was|were|would be|may be|could be)\s+)?(?:(?:an?|the)\s+)?"
    r"(?:also|equally|too|as well|works?|fits?|satisf(?:y|ies)|another|other|alternative|valid|acceptable|accepted"
    r"|possible|fine|ok|okay|correct|right)\b",
    re.IGNORECASE,
)
_CALLED_TRUE = re.compile(
    r"\b(?:truth|(?:true|real|correct|actual|right)\s+(?:value|result|one|number|solution))\s*"
    rf"(?:is|was|are|would be|equals|:)\s*{_VALUE}",
    re.IGNORECASE,
)
_CALLED_OTHER = re.compile(
    r"\b(?:other|second|another|alternate|alternative|additional)\s+"
    r"(?:answer|solution|possibility|root|value|option|result|choice)s?\s*(?:is|are|was|would be|:|=)"
    rf"[\s*_:]*{_VALUE}"
    r"|(?:\n|[.!?]\s)\W*(?:final|edit|update|correction|revised|ans)\b[\s*_]*:[\s*_:]*"
    rf"(?:it(?: i|')s\s+|now\s+)?{_VALUE}",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    r"\b(?:so|thus|hence|therefore)\b[,\s$]*(?:[A-Za-z]\s*=|(?:it|this)\s+(?:is|equals))"
    rf"\s*{_VALUE}\s*\$?[.\s*]*\Z",
    re.IGNORECASE,
)
_OTHER_CASE = re.compile(
    rf"[\s$]*(?:(?:is|was|holds|applies|works)\s+)?{_CASE}[^.\n;,]{{1,60}}[;,]\s*(?:and\s+|but\s+)?"
    rf"(?:{_VALUE}\s*{_CASE}|{_CASE}[^.\n]{{0,40}}?\b(?:is|it's|gets?|gives?|equals?|be)\s*{_VALUE})",
    re.IGNORECASE,
)
_BARE_VALUE = re.compile(
    r"(?<![\w^\\.=+*/<>-])(?<![=+*/<>^-]\s)(\$(?=[^$\n]*(?:\d|\\pi\b))[^$\n=<>]{1,80}\$|-?\d+(?:[.,/]\d+)*(?:\s?\\?%)?)"
    r"(?=[*_`]*\s*(?:[.,;:!?)\]\n]|\Z|\b(?:and|or|but|if|when|instead|too|also|as well|works?|is the|is my)\b"
    r"|[(\[]?(?:back-?up|fall-?back|alternative|spare|second choice)\b))"
    r"(?![.,]\d)",
    re.IGNORECASE,
)
_PART_OF_SENTENCE = re.compile(
    r"(?:\b(?:for|in|per|of|by|with|from|at|on|after|before|over|under|than|to|into|above|below|between|about|each"
    r"|every"
    r"|step|part|question|problem|equation|eq\.|theorem|lemma|page|figure|level|case|line|section|version|not|except"
    r"|only"
    r"|without)|[-+*/=<>^\u2212\u00d7\u00f7])[\s$({\[]*(?:the\s+)?\Z"
    r"|\b(?:the|its|their|his|her)\s+"
    r"(?!(?:answer|value|result|solution|key|number|truth|root|other|second|one)\b)[a-z]+"
    r"(?:\s+of\s+\S{1,20})?\s+(?:is|are|was|were|equals)\s*\$?\Z",
    re.IGNORECASE,
)
"""Text before a value that makes it a part of a phrase, an operand, or the value of another quantity."""
_REASON_BEFORE = re.compile(
    r"\b(?:because|since|where|given|using|check(?:s|ing|ed)?|verif\w+|substitut\w+|plug\w*|note|recall|reject\w*"
    r"|extraneous|discard\w*|exclud\w*|divisible|prime|confidence|certainty)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<!\be)(?<!\bi)(?<!\bk)(?<!\ba)[.!?](?=\s|\Z)(?!\s*[a-z])|\n")
_MOST_CHARACTERS_TO_COMPARE = 120
_MOST_FORMULA_CHARACTERS = 2000
_GIVEN = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*(?!\w)")
_OFFERED = re.compile(
    rf"\b(?:replaced? (?:it |this |that )?(?:by|with)|argue for|in favou?r of"
    rf"|one (?:reading|interpretation|view),?)\s*{_VALUE}|\(\s*=\s*{_VALUE}\s*\)|{_VALUE}\s+instead\b"
    rf"|(?:\A|\n)[\s>|*-]*\n[\s>|*_`-]*{_VALUE}[\s*_`|]*(?:\n|\Z)",
    re.IGNORECASE,
)
_CALLED = (_CALLED_VALID, _CALLED_TRUE, _CALLED_OTHER, _OFFERED)
_SAME_NAME_BEFORE = re.compile(
    r"(?:\A|[\s$,;{(&])([A-Za-z])(?:_\{?\w\}?)?\s*=\s*([^\s=,;$](?:[^=,;$\n]{0,58}[^\s=,;$])?)\s?\$?\s?"
    r"(?:[,;]|\b(?:or|and)\b|\\(?:text|mathrm)\s*\{\s*(?:or|and)\s*\})(?:\s|\\[,;: ]|\\q?quad(?![A-Za-z]))*"
    r"(?:or\s+)?\$?\s*\1(?:_\{?\w\}?)?\s*=\s*\$?\s*\Z"
)
_JOINED_BEFORE = re.compile(
    r"(?:\A|[\s:$({\[])(?P<added>-?\d+(?:[.,/]\d+)*)\$?(?:\s+and|[^\S\n]+or(?: else)?)\s+\$?\s*\Z"
    r"|(?:\A|\n|[.!?:]\s|\beither\s)[\s$*]*(?P<listed>-?\d+(?:[.,/]\d+)*)\$?\s*[,;]\s*\$?\s*\Z",
    re.IGNORECASE,
)


def offers_other_value_behind(text: str, end: int, contents: Collection[str], prompt: str = "") -> bool:
    """Return True if the text behind position `end` calls another value valid, or gives it for another case.

    Args:
        text: contains the box.
        end: first position behind the box.
        contents: what the boxes contain; these values are not other values.
        prompt: its numbers are given; a text may repeat them behind the box, unless it calls them valid.
    """
    behind = NEXT_QUESTION.split(text[end : end + _WINDOW], maxsplit=1)[0]
    if not any(character.isdigit() or character == "$" for character in behind):
        return False
    case = _OTHER_CASE.match(behind)
    found = [match for pattern in _CALLED for match in pattern.finditer(behind)]
    concluded = _CONCLUDED.search(behind) if len(text) - end <= _WINDOW else None
    found += [match for match in (case, concluded) if match is not None]
    values = {value.strip("$ ") for match in found for value in match.groups() if value is not None}
    given = set(_GIVEN.findall(prompt))
    opened = text[max(0, text.rfind("\n\n", 0, end), end - _MOST_FORMULA_CHARACTERS) : end]
    if (opened.count("$") - opened.count("\\$")) % 2:  # the formula around the box is a part of the answer
        behind = behind.partition("$")[2]
    values.update(value for value in _bare_values(behind) if value not in given)
    return any(not _is_named(value, contents) for value in values)


def _bare_values(behind: str) -> list[str]:
    """Return the values that end a clause of a text without being an operand, a part of a phrase, or a reason."""
    found: list[str] = []
    for match in _BARE_VALUE.finditer(behind):
        sentence = _SENTENCE_END.split(behind[: match.start()])[-1]
        if _PART_OF_SENTENCE.search(sentence) is None and _REASON_BEFORE.search(behind[: match.end() + 30]) is None:
            found.append(match[1].strip("$ "))
    return found


def _is_named(value: str, contents: Collection[str]) -> bool:
    """Return True if a content is the value, or is text with the value as a number: `72 apples`."""
    number = re.compile(rf"(?<![\w.-]){re.escape(value)}(?!\w|[.,/]\d)")
    return any(
        content.strip() == value
        or ("\\" not in content and number.search(content) is not None)
        or (len(content) <= _MOST_CHARACTERS_TO_COMPARE and is_right(value, content))
        for content in contents
    )


def value_joined_before(before: str) -> str | None:
    r"""Return the number that a word or a comma joins to a box behind `before`; None without one.

    It is `7` for `7 and \boxed{4}`, and for `7, \boxed{4}` at the beginning of a line or sentence.
    """
    match = _JOINED_BEFORE.search(before)
    return None if match is None else match["added"] or match["listed"]


def value_of_same_name_before(before: str) -> str | None:
    r"""Return the value of `x = 3` if `before` ends in `x = 3, x =` or `x_1 = 3 or x_2 =`; None without one."""
    match = _SAME_NAME_BEFORE.search(before[-_WINDOW:])
    return None if match is None else match[2]

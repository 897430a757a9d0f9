r"""Recognize other values that the text around a box offers next to the value in it.

- A value that the text behind the box calls valid as well: `\boxed{4}, though 5 also works`.
- Cases: `\boxed{4} for even n, 5 for odd n`.
- A value that the text behind the box names as its last word: `Other solution: 5`, `Edit: it is 5`.
- A value that `and` joins to the box: `7 and \boxed{4}`, and another value of the same name: `x = 3, x = \boxed{4}`.

A value that equals the content of the box is no other value. Only a short text around the box is searched.
Asserted by tests/unit/rewards/final_answers/test_alternatives.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection

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
    rf"[\s$]*{_CASE}[^.\n;,]{{1,60}}[;,]\s*(?:and\s+|but\s+)?"
    rf"(?:{_VALUE}\s*{_CASE}|{_CASE}[^.\n]{{0,40}}?\b(?:is|it's|gets?|gives?|equals?|be)\s*{_VALUE})",
    re.IGNORECASE,
)
_CALLED = (_CALLED_VALID, _CALLED_TRUE, _CALLED_OTHER)
_SAME_NAME_BEFORE = re.compile(
    r"(?:\A|[\s$,;{(&])([A-Za-z])(?:_\{?\w\}?)?\s*=\s*([^\s=,;$](?:[^=,;$\n]{0,58}[^\s=,;$])?)\s?\$?\s?"
    r"(?:[,;]|\b(?:or|and)\b|\\(?:text|mathrm)\s*\{\s*(?:or|and)\s*\})(?:\s|\\[,;: ]|\\q?quad(?![A-Za-z]))*"
    r"(?:or\s+)?\$?\s*\1(?:_\{?\w\}?)?\s*=\s*\Z"
)
_JOINED_BEFORE = re.compile(r"(?:\A|[\s:$({\[])(-?\d+(?:[.,/]\d+)*)\$?\s+and\s+\$?\s*\Z", re.IGNORECASE)


def offers_other_value_behind(text: str, end: int, contents: Collection[str]) -> bool:
    """Return True if the text behind position `end` calls another value valid, or gives it for another case.

    Args:
        text: contains the box.
        end: first position behind the box.
        contents: what the boxes contain; these values are not other values.
    """
    behind = text[end : end + _WINDOW]
    if not any(character.isdigit() or character == "$" for character in behind):
        return False
    case = _OTHER_CASE.match(behind)
    found = [match for pattern in _CALLED for match in pattern.finditer(behind)]
    concluded = _CONCLUDED.search(behind) if len(text) - end <= _WINDOW else None
    found += [match for match in (case, concluded) if match is not None]
    values = {value.strip("$ ") for match in found for value in match.groups() if value is not None}
    return any(not _is_named(value, contents) for value in values)


def _is_named(value: str, contents: Collection[str]) -> bool:
    """Return True if a content is the value, or is text with the value as a number: `72 apples`."""
    number = re.compile(rf"(?<![\w.-]){re.escape(value)}(?!\w|[.,/]\d)")
    return any(
        content.strip() == value or ("\\" not in content and number.search(content) is not None) for content in contents
    )


def value_joined_before(before: str) -> str | None:
    r"""Return the number that `and` joins to a box behind `before`: `7` for `7 and \boxed{4}`; None without one."""
    match = _JOINED_BEFORE.search(before)
    return None if match is None else match[1]


def value_of_same_name_before(before: str) -> str | None:
    r"""Return the value of `x = 3` if `before` ends in `x = 3, x =` or `x_1 = 3 or x_2 =`; None without one."""
    match = _SAME_NAME_BEFORE.search(before[-_WINDOW:])
    return None if match is None else match[2]

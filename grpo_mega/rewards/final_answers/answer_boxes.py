r"""Find the boxes of a text: `\boxed{x}`, `\fbox{x}`, and `\boxed x` up to the end of the line.

Boxes that only a comma, `or` or `and` separates are one list. All patterns take linear time in the length of the text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from grpo_mega.rewards.math_answers.braces import BRACE, closing_brace

BOXED_START = r"\boxed{"

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{?)")
_MOST_OF_LINE = 4000  # characters on either side of a box, in which its braces are counted
_BOX_WITHOUT_BRACES = re.compile(r"[^\n$]*")
_SPACE_COMMAND = re.compile(r"(?<!\\)\\\s+\Z")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&/]|\\[(),;:!\[\] ]|\\q?quad|\\(?:text|mathrm)\s*\{\s*(?:or|and)\s*\}"
    r"|\b(?:or|and|maybe|possibly|perhaps)\b)*",
    re.IGNORECASE,
)


class Box(NamedTuple):
    """An outermost box: start and end in the text, and its content, which is None for an unclosed box."""

    start: int
    end: int
    content: str | None
    closes_too_much: bool


def boxed_answer(text: str) -> str | None:
    """Return the content of the last box, or of the last boxes if they form one list; None without a box.

    A last box that is not closed is an empty answer. So is one with a superfluous `}` behind it in its line: its braces
    are not those that were meant.
    """
    boxes = find_boxes(text)
    if not boxes:
        return None
    answers: list[str] = []
    start = len(text)
    for box in reversed(boxes):
        if answers and _BETWEEN_BOXES.fullmatch(text, box.end, start) is None:
            break
        if box.content is None or box.closes_too_much:
            return ""
        start = box.start
        if box.content not in answers:
            answers.insert(0, box.content)
    return answers[0] if len(answers) == 1 else " ; ".join(answers)


def find_boxes(text: str) -> list[Box]:
    """Return the outermost boxes of a text; only the last one can have `closes_too_much`."""
    boxes: list[Box] = []
    position = 0
    while (match := _BOX.search(text, position)) is not None:
        if match[1]:
            end = closing_brace(text, match.end())
            content = None if end is None else text[match.end() : end]
            position = len(text) if end is None else end + 1
        else:
            line = _BOX_WITHOUT_BRACES.match(text, match.end())
            assert line is not None
            content, position = line.group().strip().rstrip("."), line.end()
        plain = None if content is None else without_boxes(_SPACE_COMMAND.sub("", content)).strip()
        boxes.append(Box(match.start(), position, plain, False))
    if boxes and boxes[-1].content is not None:
        last = boxes[-1]
        boxes[-1] = last._replace(closes_too_much=_closes_too_much(text, last.start, last.end))
    return boxes


def _closes_too_much(text: str, start: int, end: int) -> bool:
    line_start, line_end = text.rfind("\n", 0, start) + 1, text.find("\n", end)
    first = max(line_start, start - _MOST_OF_LINE)
    last = min(len(text) if line_end < 0 else line_end, end + _MOST_OF_LINE)
    depth = 0
    for match in BRACE.finditer(text, first, last):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth < 0 and match.start() >= end:
            return True
        depth = max(depth, 0)  # before the box
    return False


def last_box_content(text: str) -> str | None:
    """Return the content of the last box; None without a box, or if the last one is not closed."""
    boxes = find_boxes(text)
    return boxes[-1].content if boxes else None


def without_boxes(text: str) -> str:
    r"""Return the text with `{x}` instead of `\boxed{x}`."""
    return _BOX.sub(lambda match: match[1], text)

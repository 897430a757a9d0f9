"""Read the lines behind `####`, GSM8K's marker of the final answer. `#### Step 1` with text below it is a heading."""

from __future__ import annotations

import re
from typing import NamedTuple

from grpo_mega.rewards.final_answers.answer_boxes import without_boxes

MARKER = "####"

_MAX_LINES = 64  # read from the end of the text
_MAX_LINE = 2000
DECORATION = " \t\r\n*_`:"
"""Layout around an answer in a line."""
_LIST_HEADING = re.compile(r"\s*[*_]*[0-9]{1,2}[.):]\s+[*_]*[A-Za-z]")
_WORD = re.compile(r"[\s*_(]*[A-Za-z]{3,}")
_ANSWER = re.compile(
    r"[\s*_(]*(?:(?:the|so|thus|hence|final|correct)\b\W{1,3}){0,4}answer\b[\s*_:]*(?:is\b)?[\s*_:]*[^\s*_:.]",
    re.IGNORECASE,
)


class MarkedLine(NamedTuple):
    """A line behind a marker. start and end: place of marker and line; is_last: no text before the next marker."""

    start: int
    end: int
    text: str
    is_last: bool


def marked_answer(text: str) -> str | None:
    """Return the line behind the last marker; None when there is no marker or nothing behind it."""
    _, marker, rest = text.rpartition(MARKER)
    line = rest.lstrip().partition("\n")[0].strip(DECORATION) if marker else ""
    return line or None


def marked_lines(text: str) -> list[MarkedLine]:
    """Return the lines behind all markers, without headings and empty lines."""
    found: list[MarkedLine] = []
    end = len(text)
    while len(found) < _MAX_LINES and (last := text.rfind(MARKER, 0, end)) >= 0:
        start = last
        while start and text[start - 1] == "#":
            start -= 1
        line = _line_behind(text, start, last + len(MARKER), end)
        if line.text.strip(DECORATION) and not _is_heading(line, is_last=end == len(text)):
            found.append(line)
        end = start
    return found[::-1]


def _line_behind(text: str, start: int, begin: int, end: int) -> MarkedLine:
    rest = text[begin : min(end, begin + _MAX_LINE)]
    skipped = len(rest) - len(rest.lstrip())
    line, _, below = rest[skipped:].partition("\n")
    return MarkedLine(start, begin + skipped + len(line), without_boxes(line), not below.strip())


def _is_heading(line: MarkedLine, *, is_last: bool) -> bool:
    if line.is_last and is_last:
        return False
    if _LIST_HEADING.match(line.text) is not None:
        return not line.is_last
    return _WORD.match(line.text) is not None and "=" not in line.text and _ANSWER.match(line.text) is None

"""Fenced blocks of a Markdown text, by the rules of CommonMark (section 4.5, "Fenced code blocks").

A fence is a line of at least three backticks or tildes; it may stand in a quotation or a list item. A block ends at a
fence of the same character that is at least as long and has no info string, or with the text. Its lines lose the
indentation of the opening fence. Where language models depart from CommonMark, this module does too:

- An opening fence may be indented by any number of columns.
- A fence with an info string inside a block of the same character begins the next block: the closing fence was
  forgotten.
- An opening fence with a label may stand at the end of a line of text: "The program: ```python".
- The last block of a text may end with a fence behind its last line of code, if it is not closed otherwise.
- A block without a language, or of Markdown, that contains a block with a language is replaced by the blocks in it.

Asserted by tests/unit/rewards/test_fenced_blocks.py.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field

_FENCE = re.compile(
    r"(?P<lead>[ \t]*(?:(?:>|[-*+](?=[ \t])|[0-9]{1,9}[.)](?=[ \t]))[ \t]*)*)(?P<mark>`{3,}|~{3,})(?P<info>[^\r]*)\r?\Z"
)
_FENCE_BEHIND_TEXT = re.compile(r"(?P<text>[^`]*)(?P<mark>`{3,})(?P<info>[A-Za-z][\w+#.-]*)[ \t]*\r?\Z")
_QUOTE = re.compile(r"[ \t]*>[ ]?")
_LABEL = re.compile(r"[{.\s]*(?:language-|lang=)?([A-Za-z0-9_+#.-]*)")
_MARKDOWN = ("", "markdown", "md")
_FIRST_OF_TILDE_INFO = frozenset(string.ascii_letters + "{.")  # `~~~^~~~` is a part of a traceback of Python
_MAX_DEPTH = 3
_SHORT = 32  # characters of a line whose reading is kept
_MAX_CLOSING_INDENT = 3


@dataclass(frozen=True)
class FencedBlock:
    """The content of a block, and its label: the first word of the info string in lower case, empty without one."""

    label: str
    content: str
    is_closed: bool


@dataclass(frozen=True)
class _Opening:
    mark: str
    info: str
    columns: int
    num_quotes: int
    label: str = field(init=False)

    def __post_init__(self) -> None:
        match = _LABEL.match(self.info)
        object.__setattr__(self, "label", match[1].lower() if match is not None else "")

    def is_ended_by(self, fence: _Opening) -> bool:
        same = fence.mark[0] == self.mark[0] and len(fence.mark) >= len(self.mark)
        return same and fence.num_quotes == self.num_quotes and fence.columns <= self.columns + _MAX_CLOSING_INDENT


def fenced_blocks(text: str) -> Iterator[FencedBlock]:
    """Yield the fenced blocks of a text in order. A text of 1 MB may have 125,000 of them: do not keep them all."""
    return _blocks(text, 0)


@dataclass(frozen=True)
class BlockSpan:
    """Where a block stands in a text, its fences included. `is_last` is True if only the end of the text ended it."""

    start: int
    end: int
    is_closed: bool
    is_last: bool


def block_spans(text: str, position: int = 0) -> Iterator[BlockSpan]:
    """Yield where the fenced blocks of text[position:] stand, from left to right; blocks in blocks are not searched."""
    for raw in _raw_blocks(text, position):
        yield BlockSpan(raw.start, raw.end, raw.is_closed, raw.is_last)


@dataclass
class _RawBlock:
    opening: _Opening
    start: int
    end: int = 0
    is_closed: bool = False
    is_last: bool = False
    lines: list[str] = field(default_factory=list)


def _blocks(text: str, depth: int) -> Iterator[FencedBlock]:
    if "```" in text or "~~~" in text:
        for raw in _raw_blocks(text, 0):
            yield from _finished(raw.opening, raw.lines, depth, is_closed=raw.is_closed)


def _raw_blocks(text: str, position: int) -> Iterator[_RawBlock]:
    block: _RawBlock | None = None
    while position < len(text):
        begin, newline = position, text.find("\n", position)
        row = text[begin:] if newline < 0 else text[begin:newline]
        position = len(text) if newline < 0 else newline + 1
        line = text[begin:position]
        fence = _read_fence(row) if "```" in row or "~~~" in row else None
        if block is not None and block.opening.num_quotes and row.count(">") < block.opening.num_quotes:
            block.end = begin  # the quotation ended, and the block with it
            yield block
            block = None
        if block is None:
            opening = fence or _read_fence_behind_text(row)
            block = _RawBlock(opening, begin) if opening is not None else None
        elif fence is not None and block.opening.is_ended_by(fence):
            block.end, block.is_closed = (begin, False) if fence.info else (position, True)
            yield block
            block = _RawBlock(fence, begin) if fence.info else None
        else:
            block.lines.append(_without_indent(line, block.opening))
    if block is not None:
        block.end, block.is_last = len(text), True
        yield block


def _read_fence(row: str) -> _Opening | None:
    return _read_short_fence(row) if len(row) <= _SHORT else _read_any_fence(row)


def _read_any_fence(row: str) -> _Opening | None:
    match = _FENCE.match(row)
    if match is None:
        return None
    info = match["info"].strip()
    if "`" in info if match["mark"][0] == "`" else info and info[0] not in _FIRST_OF_TILDE_INFO:
        return None
    return _Opening(match["mark"], info, _columns(match["lead"]), match["lead"].count(">"))


_read_short_fence = functools.lru_cache(maxsize=1024)(_read_any_fence)  # a hostile text repeats one fence 125,000 times


def _read_fence_behind_text(row: str) -> _Opening | None:
    match = _FENCE_BEHIND_TEXT.match(row)
    return _Opening(match["mark"], match["info"], 0, 0) if match is not None and match["text"].strip() else None


def _finished(opening: _Opening, lines: list[str], depth: int, *, is_closed: bool) -> list[FencedBlock]:
    label = opening.label
    content = "".join(lines)
    if not is_closed and (glued := content.rstrip()).endswith(opening.mark):
        code = glued.removesuffix(opening.mark)
        content = code if code == code.rstrip() else content
    inner = list(_blocks(content, depth + 1)) if label in _MARKDOWN and depth < _MAX_DEPTH else []
    return inner if any(block.label for block in inner) else [FencedBlock(label, content, is_closed)]


def _columns(text: str) -> int:
    return len(text.expandtabs(4)) if text else 0


def _without_indent(line: str, opening: _Opening) -> str:
    """Return a line of a block without its quotation marks and at most the opening fence's indentation."""
    columns = opening.columns
    for _ in range(opening.num_quotes):
        match = _QUOTE.match(line)
        if match is not None:
            columns -= _columns(match.group())
            line = line[match.end() :]
    position = 0
    while position < len(line) and columns > 0 and line[position] in " \t":
        columns -= 1 if line[position] == " " else 4
        position += 1
    return " " * -columns + line[position:] if columns < 0 and position else line[position:]

"""Separation of a completion into its thought and its answer, and the completion as the chat template began it.

Some chat templates end the prompt with an opening tag such as `<think>`. The completion then holds only the closing
tag. All functions decide from the end of the prompt whether a tag is open, and read prompt and completion together.

Graders read only the answer (`answer_part`): an answer inside a thought does not count.
Asserted by tests/unit/rewards/test_thought.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from grpo_mega.rewards.fenced_blocks import BlockSpan, block_spans

THOUGHT_TAGS = ("think", "thinking", "thought", "reasoning")
"""Names of the tags around a thought."""

_OPENED = re.compile(r"<([A-Za-z][\w-]{0,63})>\s*\Z")
_LONGEST_END = 300  # characters of the prompt that are searched for an opened tag
_FENCE = re.compile(r"```|~~~")
THOUGHT_TAG = re.compile(rf"<(/?)\s{{0,9}}({'|'.join(THOUGHT_TAGS)})\s{{0,9}}>", re.IGNORECASE)
_CLOSING_TAGS = {name: re.compile(rf"</\s{{0,9}}{name}\s{{0,9}}>", re.IGNORECASE) for name in THOUGHT_TAGS}


def opened_tag(prompt: str) -> str | None:
    """Return the name of the tag that the prompt's end opens (`think` for `...<think>`), else None."""
    match = _OPENED.search(prompt[-_LONGEST_END:])
    return match[1] if match is not None else None


def with_opened_tag(prompt: str, completion: str, names: Collection[str] = THOUGHT_TAGS) -> str:
    """Return the completion after the tag that the prompt opened, if that tag is one of `names`."""
    tag = opened_tag(prompt)
    return f"<{tag}>{completion}" if tag is not None and tag.lower() in names else completion


def answer_part(prompt: str, completion: str) -> str:
    """Return the completion without its thoughts; they are replaced by spaces.

    A thought begins at the prompt's end or at an opening tag of THOUGHT_TAGS and ends at the closing tag with the same
    name; a tag inside of it is a part of it. A thought that is never closed ends with the completion. A closing tag
    before any opening tag ends a thought that began before the completion. Outside of a thought, a tag in a fenced
    block is text of the program, as in `print("</think>")`.
    """
    text = with_opened_tag(prompt, completion)
    parts: list[str] = []
    position, is_first = 0, True
    while (tag := _next_tag(text, position, is_first=is_first)) is not None:
        closes, name = tag[1] == "/", tag[2]
        if not (closes and is_first):
            parts.append(text[position : tag.start()])
        position, is_first = tag.end(), False
        if not closes:
            position = _end_of_thought(text, position, name)
            if position < 0:
                return " ".join(parts)
    parts.append(text[position:])
    return " ".join(parts)


def _end_of_thought(text: str, position: int, name: str) -> int:
    closing = _CLOSING_TAGS[name.lower()].search(text, position)
    return -1 if closing is None else closing.end()


def _next_tag(text: str, position: int, *, is_first: bool) -> re.Match[str] | None:
    """Return the first tag of a thought at or behind `position`, which is outside of thoughts and blocks."""
    blocks: Iterator[BlockSpan] | None = None
    block: BlockSpan | None = None
    found = THOUGHT_TAG.search(text, position)
    while found is not None:
        if blocks is None and _FENCE.search(text, position, found.start()) is not None:
            blocks = block_spans(text, position)
        if blocks is None:
            return found
        while block is None or block.end <= found.start():
            block = next(blocks, None)
            if block is None:
                return found
        if not _contains(text, block, found, is_first=is_first):
            return found
        found = THOUGHT_TAG.search(text, found.end())
    return None


def _contains(text: str, block: BlockSpan, tag: re.Match[str], *, is_first: bool) -> bool:
    """Return True if a tag is text of a block.

    A tag in a line of its own may end a block that is not closed, and the first closing tag a thought that began before
    the completion, in a block that a draft left open.
    """
    if block.start > tag.start() or not (block.is_closed or block.is_last):
        return False
    line_start = text.rfind("\n", 0, tag.start()) + 1
    line_end = text.find("\n", tag.end())
    rest = text[line_start : tag.start()] + text[tag.end() : line_end if line_end >= 0 else len(text)]
    return bool(rest.strip()) or (block.is_closed and not (is_first and tag[1]))

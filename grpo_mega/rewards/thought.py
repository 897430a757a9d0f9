"""Separation of a completion into its thought and its answer, and the completion as the chat template began it.

Some chat templates end the prompt with an opening tag such as `<think>`. The completion then holds only the closing
tag. All functions decide from the end of the prompt whether a tag is open, and read prompt and completion together.

Graders read only the answer (`answer_part`): an answer inside a thought does not count.
Asserted by tests/unit/rewards/test_thought.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection

THOUGHT_TAGS = ("think", "thinking", "thought", "reasoning")
"""Names of the tags around a thought."""

_OPENED = re.compile(r"<([A-Za-z][\w-]{0,63})>\s*\Z")
_LONGEST_END = 300  # characters of the prompt that are searched for an opened tag
_THOUGHT_TAG = re.compile(rf"<(/?)({'|'.join(THOUGHT_TAGS)})>")


def opened_tag(prompt: str) -> str | None:
    """Return the name of the tag that the prompt's end opens (`think` for `...<think>`), else None."""
    match = _OPENED.search(prompt[-_LONGEST_END:])
    return match[1] if match is not None else None


def with_opened_tag(prompt: str, completion: str, names: Collection[str] = THOUGHT_TAGS) -> str:
    """Return the completion after the tag that the prompt opened, if that tag is one of `names`."""
    tag = opened_tag(prompt)
    return f"<{tag}>{completion}" if tag in names else completion


def answer_part(prompt: str, completion: str) -> str:
    """Return the completion without its thoughts; they are replaced by spaces.

    A thought begins at the prompt's end or at an opening tag of THOUGHT_TAGS and ends at the closing tag with the same
    name; a tag inside of it is a part of it. A thought that is never closed ends with the completion. A closing tag
    before any opening tag ends a thought that began before the completion.
    """
    text = with_opened_tag(prompt, completion)
    parts: list[str] = []
    position, opened, is_first = 0, "", True
    for match in _THOUGHT_TAG.finditer(text):
        closes, name = match[1] == "/", match[2]
        if opened:
            if not closes or name != opened:
                continue
            opened = ""
        else:
            if not (closes and is_first):
                parts.append(text[position : match.start()])
            opened = "" if closes else name
        position, is_first = match.end(), False
    if not opened:
        parts.append(text[position:])
    return " ".join(parts)

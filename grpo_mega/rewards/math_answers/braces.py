"""Find the brace that closes a group of TeX; a brace behind a backslash is text."""

from __future__ import annotations

import re

BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
"""A brace, or a backslash with the character behind it."""


def closing_brace(text: str, position: int) -> int | None:
    """Return where the group that is open at `position` is closed; None if it is not."""
    depth = 1
    for match in BRACE.finditer(text, position):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None

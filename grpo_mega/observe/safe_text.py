"""Makes text of a model or a user safe to show: no terminal escape, no broken UTF-8, no endless line.

Asserted by tests/unit/observe/test_safe_text.py.
"""

from __future__ import annotations

import html
import re

# Control characters except tab and newline, halves of surrogate pairs, characters that change the direction of text.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def printable(text: str) -> str:
    r"""Return the text with each unsafe character written as its escape, such as `\x1b` or `\ud800`.

    Unsafe are control characters except tab and newline, lone surrogates (which have no UTF-8 encoding), and characters
    that change the direction of text. A terminal then receives no escape sequence.
    """
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str, max_characters: int) -> str:
    """Return printable text without line breaks, cut to `max_characters` as in `cut`."""
    return cut(printable(text).replace("\n", "\\n").replace("\t", "\\t"), max_characters)


def cut(text: str, max_characters: int) -> str:
    """Return the first `max_characters` characters, with the number of those that were left out."""
    left_out = len(text) - max_characters
    return text if left_out <= 0 else f"{text[:max_characters]} [{left_out:,} more characters]"


def html_text(text: str, max_characters: int) -> str:
    """Return printable text for an HTML page, cut to `max_characters` before `<`, `>`, `&` and quotes are escaped."""
    return html.escape(cut(printable(text), max_characters))

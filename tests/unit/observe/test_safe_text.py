"""Text of models and users is shown without effects."""

from __future__ import annotations

import pytest

from grpo_mega.observe.safe_text import cut, html_text, one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b31m", "\\x9b31m"),  # the one-byte form of the same escape
        ("a\tb\nc", "a\tb\nc"),
        ("over\rwritten", "over\\rwritten"),
        ("\ud800", "\\ud800"),
        ("\u202eabc", "\\u202eabc"),
        ("na\u00efve \u4e2d \U0001f600", "na\u00efve \u4e2d \U0001f600"),
    ],
)
def test_unsafe_characters_become_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode("utf-8")


def test_broken_utf_8_that_was_read_with_surrogates_has_an_encoding_again() -> None:
    text = b"Zo\xe9".decode("utf-8", errors="surrogateescape")
    assert printable(text) == "Zo\\udce9"


def test_a_long_line_is_cut_with_the_number_of_characters_left_out() -> None:
    assert cut("x" * 1_000_000, 10) == "xxxxxxxxxx [999,990 more characters]"
    assert cut("short", 10) == "short"


def test_html_is_text() -> None:
    assert html_text("</script><b>&'\"", 100) == "&lt;/script&gt;&lt;b&gt;&amp;&#x27;&quot;"
    assert html_text("<<<<", 2) == "&lt;&lt; [2 more characters]"  # cut before it is escaped


def test_one_line_has_no_line_breaks() -> None:
    assert one_line("a\nb\tc\x1b", 100) == "a\\nb\\tc\\x1b"

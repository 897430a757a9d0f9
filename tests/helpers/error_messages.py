"""Check of what an error message names, without its sentences."""

from __future__ import annotations


def assert_names(message: object, *words: str) -> None:
    """Assert that the message contains the words in this order: key and value first, then the remedy.

    Args:
        message: an error, or its text.
        words: parts of the text that a user needs. A part does not match inside a longer number.
    """
    text, begin = str(message), 0
    for word in words:
        found = text.find(word, begin)
        while found >= 0 and _continues_a_number(text, found, word):
            found = text.find(word, found + 1)
        assert found >= 0, f"{word!r} is missing, or stands before other words, in: {text}"
        begin = found + len(word)


def _continues_a_number(text: str, found: int, word: str) -> bool:
    before, after = text[:found][-1:], text[found + len(word) :][:1]
    return (word[0].isdigit() and before.isdigit()) or (word[-1].isdigit() and after.isdigit())

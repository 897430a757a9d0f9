"""The tests' check of error messages: words in order, and no part of a longer number."""

from __future__ import annotations

import pytest

from tests.helpers.error_messages import assert_names

MESSAGE = "parallel.tp=3 does not divide the 16 heads; use one of 1, 2, 4"


@pytest.mark.parametrize("words", [("parallel.tp=3", "16", "use one of 1, 2, 4"), ("1", "2", "4")])
def test_words_in_order_are_found(words: tuple[str, ...]) -> None:
    assert_names(MESSAGE, *words)


@pytest.mark.parametrize("words", [("6 heads",), ("use", "parallel.tp=3"), ("parallel.pp",), ("4", "4")])
def test_missing_and_misplaced_words_fail(words: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError):
        assert_names(MESSAGE, *words)

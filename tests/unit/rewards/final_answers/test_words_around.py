r"""The words and signs around a value that change it, and those that leave it unchanged."""

from __future__ import annotations

from fractions import Fraction

import pytest

from grpo_mega.rewards.final_answers.words_around import (
    is_continued,
    is_unfinished,
    text_before_changes,
    text_behind_changes,
)

FIVE = Fraction(5)


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ("about ", True),
        ("roughly $", True),
        ("presumably \\(", True),
        ("exactly ", False),
        ("He gives Sally ", False),
        ("the square of ", True),
        ("the digits of $", True),
        ("the price of ", False),
        ("a total of ", False),
        ("not equal to ", True),
        ("three ", True),
        ("five (", False),
        ("She has ", False),
        ("It is roughly known. So ", False),
    ],
)
def test_the_text_before_a_box(before: str, changes: bool) -> None:
    assert text_before_changes(before, FIVE) == changes


@pytest.mark.parametrize("before", ["at least ", "either ", "or ", "first "])
def test_words_of_a_list_or_a_bound_count_only_where_one_number_is_asked_for(before: str) -> None:
    assert text_before_changes(before, FIVE)
    assert not text_before_changes(before, FIVE, strict=False)


@pytest.mark.parametrize(
    ("behind", "changes"),
    [
        ("$ apples.", False),
        (" halved.", True),
        (" increased by 2", True),
        (" red apples", False),
        (" needed apples", False),
        (" (mod 7)", True),
        (" out of 6", True),
        (" of the six apples", False),
        ("...", True),
        ("$\\ldots", True),
        (" if x > 0", True),
        (", then add 2", True),
        (". squared", True),
        (". So we are done.", False),
        ("\n+ 3", True),
        ("\n- This is a list.", False),
        (" two-digit numbers", False),
        (" (five)", False),
        (" (six)", True),
    ],
)
def test_the_text_behind_a_box(behind: str, changes: bool) -> None:
    assert text_behind_changes(behind, FIVE) == changes


def test_a_sentence_in_lower_case_continues_the_one_before_it() -> None:
    assert is_continued("5. squared", 1)
    assert is_continued("5\n* 3", 1)
    assert not is_continued("5. Done", 1)
    assert not is_continued("5\n* This is a list", 1)


def test_dots_make_a_value_unfinished() -> None:
    assert is_unfinished("5...", 1)
    assert is_unfinished("$5$\u2026", 2)
    assert not is_unfinished("5. So", 1)

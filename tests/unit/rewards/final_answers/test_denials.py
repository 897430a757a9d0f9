"""Sentences that deny the value in them, and honest ones with the same words."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.final_answers.denials import is_called_wrong_before, is_called_wrong_behind, is_negated_before


@pytest.mark.parametrize(
    ("before", "is_negated"),
    [("It is not going to be ", True), ("It isn't the same as $", True), ("It is not clear, so we get ", False)],
)
def test_auxiliary_words_may_stand_behind_a_negation(before: str, is_negated: bool) -> None:
    assert is_negated_before(before) == is_negated


@pytest.mark.parametrize(
    ("before", "is_wrong"),
    [
        ("A common mistake is ", True),
        ("The typical error would be to write ", True),
        ("An upper bound for it is ", True),
        ("Rejected: ", True),
        ("It is false to claim that ", True),
        ("Twice the answer is ", True),
        ("The answer plus 1 is ", True),
        ("Correcting the mistake gives ", False),
        ("I made a mistake, so the answer is ", False),
        ("The answer is ", False),
        ("The bound is ", False),
    ],
)
def test_a_value_is_called_wrong_before_it(before: str, is_wrong: bool) -> None:
    assert is_called_wrong_before(before) == is_wrong


@pytest.mark.parametrize(
    ("behind", "is_wrong"),
    [
        (" has been disproved.", True),
        (" (ignore)", True),
        (", which I doubt", True),
        (" does not satisfy the equation.", True),
        (" is the answer; -5 is extraneous.", False),
        (" apples, and -5 is rejected.", False),
        (".", False),
    ],
)
def test_a_value_is_called_wrong_behind_it(behind: str, is_wrong: bool) -> None:
    assert is_called_wrong_behind(behind) == is_wrong

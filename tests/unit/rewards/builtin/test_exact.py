"""`exact`: equal texts after stripping, or equal plain numbers; nothing else."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.builtin.exact import exact


@pytest.mark.parametrize("completion", ["72", " 72", "72\n", "\t72 "])
def test_white_space_at_the_ends_does_not_matter(completion: str) -> None:
    assert exact("40+32=", completion, "72") == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "7",
        "7 2",
        "072",
        "72.",
        "+72",
        "73",
        "72%",
        "$72",
        "72 or 73",
        "72\n73",
        "7,2",
        "\uff17\uff12",
        "\u0667\u0662",
    ],
)
def test_any_other_difference_is_zero(completion: str) -> None:
    assert exact("40+32=", completion, "72") == 0.0


@pytest.mark.parametrize(
    ("completion", "reference"),
    [("5.0", "5"), ("5", "5.0"), ("-5.00", "-5"), ("0.5", "0.50"), ("1e3", "1000"), ("100000000000000000000", "1e+20")],
)
def test_numbers_are_compared_by_value(completion: str, reference: str) -> None:
    assert exact("", completion, reference) == 1.0


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("5.0", "5a"),
        ("5.0", "five"),
        ("5.01", "5"),
        ("\u22125", "-5"),
        ("5", "-5"),
        ("1,000", "1000"),
        ("1_000", "1000"),
        ("1/2", "0.5"),
        ("nan", "NaN"),
        ("inf", "1e999"),
        ("9007199254740993", "9007199254740992"),
        ("5.0", "05"),
    ],
)
def test_texts_and_other_numbers_stay_different(completion: str, reference: str) -> None:
    assert exact("", completion, reference) == 0.0


def test_a_thought_is_not_compared() -> None:
    assert exact("", "<think>71?</think>\n72", "72") == 1.0
    assert exact("<think>\n", "71?</think>\n72", "72") == 1.0
    assert exact("", "<think>72</think>71", "72") == 0.0
    assert exact("", "<think>72", "72") == 0.0
    assert exact("", "7<think></think>2", "72") == 0.0


def test_an_answer_in_a_thought_that_the_prompt_opened_does_not_count() -> None:
    assert exact("<think>\n", "72", "72") == 0.0

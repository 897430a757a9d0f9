"""Gaps that make a list of statements, words that offer an alternative, and retractions."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.final_answers.hedges import (
    are_adjacent,
    has_hedge_around,
    is_denied_before,
    is_denied_behind,
    is_retraction,
    visible_answer,
    without_struck_out,
)


@pytest.mark.parametrize(
    ("gap", "is_list"), [(", ", True), (" or ", True), (" it could be ", True), (". So we add ", False)]
)
def test_a_gap_between_statements(gap: str, is_list: bool) -> None:
    assert are_adjacent(f"[4]{gap}[5]", 3, 3 + len(gap)) == is_list


def test_words_around_a_statement() -> None:
    assert has_hedge_around("6 or [5]", 5, 8)
    assert has_hedge_around("[5], maybe", 0, 3)
    assert not has_hedge_around("so [5]. Done", 3, 6)


@pytest.mark.parametrize(
    ("between", "retracts"),
    [(" wait, ", True), ("No, that is wrong.", True), (" wait, or maybe ", False), (" so ", False)],
)
def test_a_retraction_offers_no_alternative(between: str, retracts: bool) -> None:
    assert is_retraction(between) == retracts


@pytest.mark.parametrize("behind", ["\nThat is wrong.", " (just kidding)", "\nNo, it is 6.", ". I am not sure."])
def test_text_behind_a_statement_denies_it(behind: str) -> None:
    assert is_denied_behind(f"[5]{behind}", 3)
    assert not is_denied_behind("[5]\nI hope it helps.", 3)


@pytest.mark.parametrize(
    ("before", "is_denied"),
    [
        ("It is not true that ", True),
        ("x > ", True),
        ("2", True),
        ("half of ", True),
        ("I think it is 5, not 6. ", False),
        ("**", False),
    ],
)
def test_the_sentence_before_a_statement_denies_it(before: str, is_denied: bool) -> None:
    assert is_denied_before(f"{before}#### 5", len(before)) == is_denied


def test_struck_out_and_hidden_text_is_removed() -> None:
    assert without_struck_out("~~5~~ <del>6</del> <!-- 7 --> 8").split() == ["8"]
    assert without_struck_out("a < b ~ c") == "a < b ~ c"


@pytest.mark.parametrize(
    "hidden",
    ["<!-- 5 -->", "~~5~~", "<del>5</del>", r"\iffalse 5 \fi", r"\begin{comment}5\end{comment}", "<think>5</think>"],
)
def test_a_hidden_text_is_no_part_of_the_visible_answer(hidden: str) -> None:
    assert visible_answer("q", f"6 {hidden} 7").split() == ["6", "7"]

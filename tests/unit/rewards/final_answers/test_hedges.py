"""Gaps that make a list of statements, words that offer an alternative, and retractions."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.final_answers.hedges import are_adjacent, has_hedge_around, is_retraction


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

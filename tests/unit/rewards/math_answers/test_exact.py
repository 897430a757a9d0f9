r"""Exact evaluation: residues of rational expressions, and no operation that grows with the size of a number."""

from __future__ import annotations

from fractions import Fraction

import pytest

from grpo_mega.rewards.math_answers.exact import (
    PRIME,
    NotRationalError,
    UndefinedError,
    fraction_value,
    residue,
    sign_variants,
)
from grpo_mega.rewards.math_answers.expressions import Expression, parse_expression
from grpo_mega.rewards.math_answers.tokens import tokenize


def read(text: str) -> Expression:
    return parse_expression(tokenize(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", Fraction(1, 10)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        (r"5 \frac{1}{4}", Fraction(21, 4)),
        (r"-1\frac12", Fraction(-3, 2)),
        ("2e3", Fraction(2000)),
        (r"\binom{5}{2} - |{-3}|", Fraction(7)),
        (r"\lfloor -\frac{1}{2} \rfloor", Fraction(-1)),
        ("5!", Fraction(120)),
    ],
)
def test_the_exact_value(text: str, value: Fraction) -> None:
    assert fraction_value(read(text)) == value


@pytest.mark.parametrize("text", ["9^{9^{9}}", "1e1000000", "2^{10000000}", "(10^{10000})^{10000}"])
def test_a_very_large_number_has_a_residue_and_no_exact_value(text: str) -> None:
    assert fraction_value(read(text)) is None
    assert 0 < residue(read(text), 1) < PRIME


def test_the_prime_is_one_modulo_four_and_i_is_a_root_of_minus_one() -> None:
    assert PRIME % 4 == 1
    assert pow(3, PRIME - 1, PRIME) == 1
    assert residue(read("i^2"), 1) == PRIME - 1


def test_a_residue_of_an_undefined_or_irrational_expression_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        residue(read(r"\frac{1}{x-x}"), 1)
    with pytest.raises(NotRationalError):
        residue(read(r"\sqrt{2}"), 1)
    with pytest.raises(NotRationalError):
        residue(read("9^{9^{9^{9}}}"), 1)


def test_plus_minus_stands_for_all_signs_or_for_two_with_minus_plus() -> None:
    assert len(sign_variants(read(r"\pm 1 \pm 2"))) == 4
    assert len(sign_variants(read(r"\pm 1 \mp 2"))) == 2
    values = {fraction_value(variant) for variant in sign_variants(read(r"\pm 1 \mp 2"))}
    assert values == {Fraction(-1), Fraction(1)}

r"""Equality of scalars where floating-point numbers would mislead."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.math_answers.expressions import Expression, parse_expression
from grpo_mega.rewards.math_answers.scalars import are_equal_scalars, are_proportional, difference
from grpo_mega.rewards.math_answers.tokens import tokenize


def read(text: str) -> Expression:
    return parse_expression(tokenize(text))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (r"\sqrt{2}\sqrt{3}-\sqrt{6}", "0"),
        (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}"),
        (r"e^{i\pi}", "-1"),
        (r"\sqrt{x}\sqrt{y}", r"\sqrt{xy}"),
        (r"\ln x^2", r"2\ln x"),
        (r"\cos^2 x + \sin^2 x", "1"),
        (r"\sqrt[3]{-8}", "-2"),
        (r"10^{200}\sqrt{2} + 1 - 1", r"10^{200}\sqrt{2}"),
        ("3.14159265", r"\pi"),
    ],
)
def test_equal_scalars(first: str, second: str) -> None:
    assert are_equal_scalars(read(first), read(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (r"10^{50}\sqrt{2}", r"10^{50}\sqrt{2}+1"),
        (r"\sqrt{2}+10^{-50}", r"\sqrt{2}"),
        (r"e^{-90}", r"e^{-100}"),
        (r"e^{-90}", "0"),
        ("2^{10000000}", "2^{10000000}+1"),
        (r"\sqrt{x^2}", "x"),
        ("|x|", "x"),
        ("3.14159266", r"\pi"),
        ("3.1416", r"\pi"),
        ("0.333334", r"\frac{1}{3}"),
        ("0.1234567", "0.12345678"),
        (r"\frac{1}{0}", r"\frac{2}{0}"),
        (r"x^{x^{x^{x}}}", r"x^{x^{x}}"),
        (r"\sqrt{20000!}", r"\sqrt{20000!}+1"),
    ],
)
def test_different_scalars(first: str, second: str) -> None:
    assert not are_equal_scalars(read(first), read(second))


def test_equations_are_multiples_of_each_other() -> None:
    line = difference(read("y"), read("2x+1"))
    assert are_proportional(line, difference(read("4x+2"), read("2y")))
    assert not are_proportional(line, difference(read("4x+2"), read("2y")), positive=True)
    assert not are_proportional(line, difference(read("y"), read("2x")))
    assert not are_proportional(line, difference(read("x"), read("x")))

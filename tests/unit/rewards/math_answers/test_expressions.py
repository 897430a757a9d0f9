r"""Expressions are parsed completely or not at all."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.math_answers.expressions import UnreadableError, parse_expression
from grpo_mega.rewards.math_answers.scalars import are_equal_scalars
from grpo_mega.rewards.math_answers.tokens import tokenize


@pytest.mark.parametrize(
    "text",
    [
        r"7\cdot",
        "7+",
        "--4",
        "9^9^9",
        "5!!",
        "x2",
        "1/2x",
        r"\sqrt23",
        r"\sqrt{2}3",
        r"\frac123",
        r"\frac{1}23",
        r"2\frac{3}{2}",
        r"\sin 2(x+1)",
        r"\cos 2\pi/3",
        r"3\sin(x}",
        "(x+1",
        "x+1)",
        "101_2",
        r"\int_0^1 x",
        r"\unknown{5}",
        "(" * 100 + "1" + ")" * 100,
    ],
)
def test_an_incomplete_or_ambiguous_expression_is_unreadable(text: str) -> None:
    with pytest.raises(UnreadableError):
        parse_expression(tokenize(text))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{23}", r"\frac{1}{23}"),
        (r"\frac12x", r"\frac{x}{2}"),
        (r"-x^2", r"-(x^2)"),
        (r"2^-1", r"\frac{1}{2}"),
        (r"\sin^2 x", r"(\sin x)^2"),
        (r"\sin^{-1} x", r"\arcsin x"),
        (r"\sin x\cos x", r"(\sin x)(\cos x)"),
        (r"\ln 2/\ln 3", r"\frac{\ln 2}{\ln 3}"),
        (r"\sqrt[3]{x}", r"x^{1/3}"),
        (r"√2", r"\sqrt{2}"),
        (r"x²", r"x^{2}"),
        (r"2\times-3", r"-6"),
        (r"|x||y|", r"|xy|"),
        (r"e^{-t}\cos t", r"\frac{\cos(t)}{e^t}"),
    ],
)
def test_notations_are_equal(text: str, same: str) -> None:
    assert are_equal_scalars(parse_expression(tokenize(text)), parse_expression(tokenize(same)))

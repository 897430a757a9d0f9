r"""Numeric evaluation computes no large number."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.math_answers.exact import UndefinedError
from grpo_mega.rewards.math_answers.expressions import parse_expression
from grpo_mega.rewards.math_answers.numeric import NumericEvaluator
from grpo_mega.rewards.math_answers.tokens import tokenize


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9}}",
        "e^{e^{e^{10}}}",
        r"\sin(10^{20})",
        r"\ln(10^{10^{10}})",
        "99999999!",
        r"\binom{100000000}{50000000}",
        "1e1000000",
        r"\sqrt{10^{100000}}",
        r"\sinh(10^{9})",
        r"x^{10^{10}}",
        r"\frac{\sqrt{2}}{0}",
        r"\ln 0",
    ],
)
def test_a_value_that_is_undefined_or_too_large_is_not_computed(text: str) -> None:
    with pytest.raises(UndefinedError):
        NumericEvaluator(1).evaluate(parse_expression(tokenize(text)))


def test_a_signed_point_has_negative_variables() -> None:
    values = [NumericEvaluator(point, signed=True).evaluate(parse_expression(tokenize("x"))) for point in range(8)]
    assert min(values) < 0 < max(values)
    assert all(NumericEvaluator(point).evaluate(parse_expression(tokenize("x"))) > 0 for point in range(8))

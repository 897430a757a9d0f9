"""`countdown`: exact arithmetic over the given numbers, each used as often as it is given."""

from __future__ import annotations

from fractions import Fraction

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.builtin.countdown import countdown, evaluate
from grpo_mega.types import UserError

TASK = '{"target": 98, "numbers": [44, 19, 35]}'


@pytest.mark.parametrize(
    "completion",
    [
        "<think>44 + 19 is 63</think><answer>44 + 19 + 35</answer>",
        "<answer>(44+19)+35 = 98</answer>",
        r"so \boxed{35 + 44 + 19}",
        "I try.\n44 - (-19) + 35",
        "<answer> [44 + 19] + 35 </answer>",
        "<answer>1</answer> no: <answer>44+19+35</answer>",
        "<answer>44+19+35</answer>, so <answer>44 + 19 + 35</answer>",
        "<answer>44 + 19 + 35 = 63 + 35 = 98</answer>",
        "<answer>44 + 19 + 35 = 98.0 points</answer>",
        "<answer>44 + 19 \u2212 \u221235</answer>",
        "<answer>98 = 44+19+35</answer>",
        "<answer>98 = 44+19+35 = 98</answer>",
        "The answer: 44+19+35 = 98",
        "So the final answer is **44+19+35 = 98**.",
        "The answer is $44+19+35$.",
        r"\(44+19+35 = 98\)",
        r"\boxed{44+19+35} = 98",
        r"$$\boxed{44+19+35}$$",
        r"<answer>\boxed{44+19+35}</answer>",
        r"\boxed{44+19+35}. I repeat: \boxed{44 + 19 + 35}",
    ],
)
def test_an_expression_that_equals_the_target_scores_one(completion: str) -> None:
    assert countdown("", completion, TASK) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "98",
        "<answer>98</answer>",
        "<answer>44 + 19 + 35 + 0</answer>",
        "<answer>44 + 54</answer>",
        "<answer>44 + 19 + 35 + 35 - 35</answer>",
        "<answer>44 + 19 + 35)</answer>",
        "<answer>(44 + 19 + 35</answer>",
        "<answer>44 19 + 35</answer>",
        "<answer>__import__('os').getpid() * 0 + 44 + 19 + 35</answer>",
        "<answer>44 ** 19 + 35</answer>",
        "<answer>44 / (19 - 19) + 35</answer>",
        "<answer>44+19+35</answer> or <answer>44*19</answer>",
        "<answer>44*19</answer>\n<answer>44+19+35</answer>",
        "<answer>44+19+35</answer> or 44*19",
        "<answer>44+19+35 or 44*19</answer>",
        "<answer>44+19+35, 44*19</answer>",
        "<answer>44+19+35 = 97</answer>",
        "<answer>44+19+35 = 98 = 97</answer>",
        "<answer>44+19+35 = 97 + 2</answer>",
        "<answer>44.0+19+35</answer>",
        "<answer>\uff14\uff14 + 19 + 35</answer>",
        "<answer>44 + \u0661\u0669 + 35</answer>",
        "<answer>97 = 44+19+35</answer>",
        "<answer>98 = 97 = 44+19+35</answer>",
        "<answer>98 = 98</answer>",
        "<answer>98 =</answer>",
        "<answer>44+19+35 = 98, 44*19</answer>",
        "<answer>44+19+35 = 98 or 97</answer>",
        "<answer>44+19+35 = 98 is wrong</answer>",
        "The answer: 44+19+35 = 97",
        "The answer is not 44+19+35",
        r"\boxed{44+19+35} = 97",
        r"-\boxed{44+19+35}",
        r"$2\boxed{44+19+35}$",
        r"\boxed{44*19}. Wait, no: \boxed{44+19+35}",
        "<answer>44%+19+35</answer>",
        "<answer>4,4+19+35</answer>",
        "<answer>44+19+35 km</answer>",
        "<answer>44+19\u00b2+35</answer>",
        "<answer>(44+19]+35</answer>",
        r"\boxed{44+19} \boxed{44+19+35}",
        r"not \boxed{44+19+35}",
        "<think><answer>44+19+35</answer></think>",
        "<think>\n44+19+35",
        "<answer>" + "(" * 200 + "44+19+35" + ")" * 200 + "</answer>",
        "<answer>" + "-" * 290 + "44+19+35</answer>",
    ],
)
def test_anything_else_scores_zero(completion: str) -> None:
    assert countdown("", completion, TASK) == 0.0


def test_fractions_of_latex_are_divisions() -> None:
    task = '{"target": 4, "numbers": [6, 3, 2]}'
    assert countdown("", r"<answer>\frac{6}{3}*2</answer>", task) == 1.0
    assert countdown("", r"\boxed{2 \times \dfrac{6}{3} = 4}", task) == 1.0
    assert countdown("", r"<answer>\frac{6*2}{3} = \frac{12}{3}</answer>", task) == 1.0
    assert countdown("", r"<answer>\frac{6}{3*2}</answer>", task) == 0.0
    assert countdown("", r"<answer>2\frac{6}{3}</answer>", task) == 0.0
    assert countdown("", r"<answer>\frac{\frac{6}{3}}{2}</answer>", '{"target": 1, "numbers": [6, 3, 2]}') == 1.0


def test_an_expression_in_the_thought_does_not_count() -> None:
    assert countdown("<think>\n", "<answer>44+19+35</answer>", TASK) == 0.0
    assert countdown("<think>\n", "<answer>1</answer></think><answer>44+19+35</answer>", TASK) == 1.0


def test_a_valid_expression_with_another_value_scores_valid_score() -> None:
    assert countdown("", "<answer>44 + 19 - 35</answer>", TASK, valid_score=0.1) == 0.1
    assert countdown("", "<answer>44 + 54</answer>", TASK, valid_score=0.1) == 0.0


def test_numbers_may_be_unused_if_use_all_is_false() -> None:
    task = '{"target": 63, "numbers": [44, 19, 35]}'
    assert countdown("", "<answer>44 + 19</answer>", task) == 0.0
    assert countdown("", "<answer>44 + 19</answer>", task, use_all=False) == 1.0
    assert countdown("", "<answer>44 + 19 + 19 - 19</answer>", task, use_all=False) == 0.0


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2+3*4", 14), ("(2+3)*4", 20), ("8/3/2", Fraction(4, 3)), ("8-3-2", 3), ("-2*-3", 6), ("1/0", None), ("", None)],
)
def test_expressions_have_their_exact_value(expression: str, value: Fraction | None) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize("reference", ["98", "{}", '{"target": 9.5, "numbers": [1]}', '{"target": 9, "numbers": []}'])
def test_a_malformed_reference_is_an_error_of_the_data(reference: str) -> None:
    with pytest.raises(ValueError, match="the reference"):
        countdown("", "<answer>1</answer>", reference)


@pytest.mark.parametrize(("name", "value"), [("use_all", 1), ("valid_score", 2), ("valid_score", True)])
def test_a_bad_argument_is_rejected_before_the_run(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{name}={value}"):
        build_rewards([RewardTerm(name="countdown", args={name: value})])

r"""The boxes of a completion with the formulas around them."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.final_answers.box_context import boxed_answers


def texts(completion: str) -> list[str]:
    return [answer.text for answer in boxed_answers(completion)]


@pytest.mark.parametrize(
    ("completion", "answers"),
    [
        (r"$x = \boxed{5}$.", ["5"]),
        (r"\begin{align} x &= \boxed{5} \end{align}", ["5"]),
        (r"The answer is a \boxed{5}, as desired.", ["5"]),
        (r"\textbf{\boxed{5}}", ["5"]),
        (r"$\boxed{5} \text{ cm}$", [r"5 \text{ cm}"]),
        (r"$\boxed{5} \text{ as desired}$", ["5"]),
        (r"$-\boxed{5}$", ["-(5)"]),
        (r"$\frac{1}{\boxed{5}}$", [r"\frac{1}{(5)}"]),
        (r"$\boxed{5}^2$", ["(5)^2"]),
        (r"$x > \boxed{5}$", ["x > (5)"]),
        (r"$1\boxed{5}$", [""]),
        (r"$\boxed{5}.5$", [""]),
        (r"not $\boxed{5}$", [""]),
        (r"\boxed{5} is wrong", [""]),
        (r"\boxed{5} thousand", ["5 thousand"]),
        (r"\boxed{5} or 6", ["5", "6"]),
        (r"first \boxed{3}, then \boxed{4}", ["3", "4"]),
        (r"(a) \boxed{3} (b) \boxed{4}", ["3", "4"]),
        (r"\boxed{3}. Wait, \boxed{4}", ["4"]),
        (r"\boxed{3}. Wait, it could also be \boxed{4}", ["3", "4"]),
        (r"\boxed{3} \boxed{4", [""]),
        ("no box 5", []),
    ],
)
def test_a_box_is_read_with_its_formula(completion: str, answers: list[str]) -> None:
    assert texts(completion) == answers


def test_an_equation_before_a_box_names_its_value() -> None:
    answers = boxed_answers(r"$x_1=\boxed{4}$ or $x_2=\boxed{5}$")
    assert [answer.label for answer in answers] == ["x_1", "x_2"]


def test_too_many_boxes_are_no_answer() -> None:
    assert texts(r"\boxed{5} or " * 200) == [""]


def test_without_retractions_every_box_counts() -> None:
    answers = boxed_answers(r"\boxed{3}. Wait, \boxed{4}", may_be_retracted=False)
    assert [answer.text for answer in answers] == ["3", "4"]


@pytest.mark.parametrize(
    ("completion", "is_part"),
    [(r"$x = \boxed{5}$", False), (r"$-\boxed{5}$", True), (r"not \boxed{5}", True), (r"$\$\boxed{5}$", False)],
)
def test_a_box_in_a_formula_or_behind_a_denial_is_a_part(completion: str, is_part: bool) -> None:
    (answer,) = boxed_answers(completion)
    assert answer.is_part == is_part
    assert completion[answer.start : answer.end] == r"\boxed{5}"

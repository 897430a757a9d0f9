r"""Where the final answer of a text is: boxes, markers, phrases and the last value of the last sentence."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.math_answers.final_answer import answer_in_prose, boxed_answer, sentence_tails


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "{5}"),
        (r"\boxed{3 or \boxed{4}}", "3 or {4}"),
        (r"\boxed{3} no, \boxed{4}", "4"),
        (r"\boxed{3} or \boxed{4}", "3 ; 4"),
        (r"$\boxed{3}$, $\boxed{4}$", "3 ; 4"),
        (r"\boxed{1} \boxed{2} \boxed{3} \boxed{4} \boxed{5}", "1 ; 2 ; 3 ; 4 ; 5"),
        (r"\boxed{4}. So \boxed{4}", "4"),
        (r"\boxed{4} \boxed{4}", "4"),
        (r"$x=\boxed{1}$ and $y=\boxed{2}$", "2"),
        (r"\boxed{4", ""),
        (r"\boxed{3} and then \boxed{4", ""),
        (r"\boxed{\frac{1}2}}", ""),
        (r"\text{the answer \boxed{5}}", "5"),
        ("no box 5", None),
    ],
)
def test_the_boxed_answer(text: str, answer: str | None) -> None:
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("We add.\n#### 42", "42"),
        ("We add.\n#### 42 or 41", "42 or 41"),
        ("The answer is 12.", "12"),
        ("The answer is: **12**", "12"),
        ("Therefore, the final answer is $-2$. I hope it is correct.", "$-2$"),
        ("The answer is 3.5 or 4.", "3.5 or 4"),
        ("First 3. In the end there are 7 apples.", "7"),
        ("So we get 3 or 4.", "3 or 4"),
        ("So we get $x=3$ or $x=4$.", "$x=3$ or $x=4$"),
        ("So $x = 5$.", "$x = 5$"),
        ("There are 12 sequences. I hope it is correct.", "12"),
        ("Final Answer: The volume of $ABC$ is 120. I hope it is correct.", "120"),
        ("It is not 5.", None),
        ("It is about 5.", None),
        ("It is a casino", None),
        ("", None),
    ],
)
def test_the_answer_in_prose(text: str, answer: str | None) -> None:
    assert answer_in_prose(text) == answer


def test_sentence_tails_begin_with_a_sentence() -> None:
    assert sentence_tails("We see. It is not even", 4) == ["It is not even", "We see. It is not even"]


def test_many_boxes_take_linear_time() -> None:
    assert boxed_answer(r"\boxed{5} or " * 20_000) == "5"
    assert boxed_answer("\\boxed{" * 20_000) == ""

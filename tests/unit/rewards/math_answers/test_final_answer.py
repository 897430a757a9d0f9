r"""Where the final answer of a text is: boxes, markers and the sentences at the end."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.math_answers.final_answer import boxed_answer, find_boxes, marked_answer, sentence_tails


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


def test_sentence_tails_begin_with_a_sentence() -> None:
    assert sentence_tails("We see. It is not even", 4) == ["It is not even", "We see. It is not even"]


def test_many_boxes_take_linear_time() -> None:
    assert boxed_answer(r"\boxed{5} or " * 20_000) == "5"
    assert boxed_answer("\\boxed{" * 20_000) == ""


def test_a_box_has_its_place_and_content() -> None:
    box = find_boxes(r"so \boxed{5}.")[0]
    assert (box.start, box.end, box.content, box.closes_too_much) == (3, 12, "5", False)


def test_the_last_marker_names_the_answer_of_a_reference() -> None:
    assert marked_answer("#### 4\n#### **5**\nmore") == "5"
    assert marked_answer("####\n") is None

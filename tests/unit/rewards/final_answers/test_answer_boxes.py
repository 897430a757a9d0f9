r"""Boxes of a text, their content and their place."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.final_answers.answer_boxes import boxed_answer, find_boxes, last_box_content, without_boxes


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


def test_many_boxes_take_linear_time() -> None:
    assert boxed_answer(r"\boxed{5} or " * 20_000) == "5"
    assert boxed_answer("\\boxed{" * 20_000) == ""


def test_a_box_has_its_place_and_content() -> None:
    box = find_boxes(r"so \boxed{5}.")[0]
    assert (box.start, box.end, box.content, box.closes_too_much) == (3, 12, "5", False)


@pytest.mark.parametrize(
    ("text", "content"), [(r"\boxed{4} \boxed{5}", "5"), (r"\boxed{5} \boxed{6", None), ("5", None)]
)
def test_the_content_of_the_last_box(text: str, content: str | None) -> None:
    assert last_box_content(text) == content


def test_boxes_are_removed_but_not_their_content() -> None:
    assert without_boxes(r"$\boxed{5}$ and \fbox{6}") == "${5}$ and {6}"

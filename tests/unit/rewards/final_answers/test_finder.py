"""Which statements of a text are its final answer."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.final_answers.finder import FinalAnswer, Source, find_final_answer

NUMBERS: tuple[Source, ...] = ("markers", "boxes", "phrases")


def found(text: str, *sources: Source) -> FinalAnswer | None:
    return find_final_answer(text, sources or NUMBERS, boxes_may_be_retracted=False)


def texts(text: str) -> list[str]:
    answer = found(text)
    assert answer is not None
    lines = [line.text for line in answer.lines]
    return [*lines, *(box.text for box in answer.boxes), *(readings[0] for readings in answer.readings)]


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("#### 4\nWait, that is wrong.\n#### 5", ["5"]),
        ("#### 4\nand so on\n#### 5", ["4", "5"]),
        (r"We know \boxed{4} is half." "\n#### 5", ["5"]),
        (r"\boxed{4}" "\n#### 5", ["5", "4"]),
        ("#### 5\n" r"or \boxed{4}", ["5", "4"]),
        (r"\boxed{5}" "\nThe answer is 4.", ["5", "4"]),
        ("#### 5\nThe answer is 4.", ["5", "4"]),
        ("The answer is 4. The answer is 5.", ["4", "5"]),
    ],
)
def test_the_statements_of_an_answer(text: str, statements: list[str]) -> None:
    assert texts(text) == statements


def test_the_first_source_that_the_text_contains_counts() -> None:
    text = r"\boxed{4}." "\nWe know.\n#### 5"
    for sources, source in ((("boxes", "markers"), "boxes"), (("markers", "boxes"), "markers")):
        answer = found(text, *sources)  # type: ignore[arg-type]
        assert answer is not None
        assert answer.source == source
    assert found("so 5") is None


@pytest.mark.parametrize("text", [r"\boxed{5} or so", "#### 5\nor 6", r"41 or \boxed{42}", "If the answer is 5, stop."])
def test_an_alternative_makes_an_answer_vague(text: str) -> None:
    answer = found(text)
    assert answer is not None
    assert answer.is_vague

"""The lines behind `####`, without headings."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.final_answers.markers import marked_answer, marked_lines


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("We add.\n#### 42", ["42"]),
        ("#### 4\n#### 5", ["4", "5"]),
        ("#### 4\ntext\n#### 5", ["4", "5"]),
        ("#### Step 1\nAdd.\n#### 5", ["5"]),
        ("#### 1. Add\nfoo\n#### 2. Multiply\n7", []),
        ("#### Answer: 4\nfoo\n#### 5", ["Answer: 4", "5"]),
        ("#### The answer\n", ["The answer"]),
        ("5\n####", []),
        (r"#### \boxed{5}", ["{5}"]),
        ("###### 5", ["5"]),
    ],
)
def test_the_lines_behind_markers(text: str, lines: list[str]) -> None:
    assert [line.text for line in marked_lines(text)] == lines


def test_a_line_has_its_place() -> None:
    (line,) = marked_lines("so #### 5\n\nend")
    assert (line.start, line.end, line.is_last) == (3, 9, False)


def test_the_last_marker_names_the_answer_of_a_reference() -> None:
    assert marked_answer("#### 4\n#### **5**\nmore") == "5"
    assert marked_answer("####\n") is None


def test_many_markers_take_linear_time() -> None:
    assert len(marked_lines("#### 5\n" * 20_000)) == 64
    assert marked_lines("#" * 200_000) == []

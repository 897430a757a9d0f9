r"""The final statements of a completion without a box."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.final_answers.statements import (
    Readings,
    last_statements,
    phrase_statements,
    result_statements,
    sentence_tails,
    stated_word,
    statements_behind,
    tagged_statement,
    tagged_values,
    value_stated_before,
)


def prose_answers(text: str) -> list[Readings]:
    found = phrase_statements(text)
    return (last_statements(text) or []) if found is None else found


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("The answer is 12.", ["12"]),
        ("The answer is: **12**", ["12"]),
        ("The answer is log 5", ["log 5"]),
        ("Therefore, the final answer is $-2$. I hope it is correct.", ["$-2$"]),
        ("The answer is 3.5 or 4.", ["3.5 or 4"]),
        ("Answer: 4\nAnswer: 5", ["4", "5"]),
        ("Answer: 4\nWait, answer: 5", ["5"]),
        ("First 3. In the end there are 7 apples.", [r"7 \text{apples}"]),
        ("So we get 3 or 4.", ["3 or 4"]),
        ("So we get $x=3$ or $x=4$.", ["$x=3$ or $x=4$"]),
        ("So $x = 5$.", ["$x = 5$"]),
        ("x=4\nx=5", ["x=4", "x=5"]),
        ("There are 12 sequences. I hope it is correct.", [r"12 \text{sequences}"]),
        ("We have 2x = 5", ["2x = 5"]),
        ("If the answer is 5, stop.", []),
        ("The answer is 5. That is wrong.", []),
        ("It is not 5.", []),
        ("It is about 5.", []),
        ("It could be 4. It could be 5.", []),
        ("Step 5", []),
        ("It is a casino", []),
        ("", []),
    ],
)
def test_the_statements_of_a_text(text: str, answers: list[str]) -> None:
    assert [readings[0] for readings in prose_answers(text)] == answers


def test_a_sentence_behind_the_phrase_has_two_readings() -> None:
    text = "Final Answer: The volume of $ABC$ is 120. I hope it is correct."
    assert prose_answers(text) == [("The volume of $ABC$ is 120", "120")]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("It is Wednesday.", "Wednesday"),
        ("The function is even.", "even"),
        ("It is not even.", None),
        ("It is odd. It is even.", None),
    ],
)
def test_the_word_that_a_sentence_states(text: str, word: str | None) -> None:
    assert stated_word(text) == word


def test_sentence_tails_begin_with_a_sentence() -> None:
    assert sentence_tails("We see. It is not even", 4) == ["It is not even", "We see. It is not even"]


def test_a_tag_at_the_end_holds_the_answer() -> None:
    assert tagged_statement("So\n<answer> 5 </answer>\n") == [("5",)]
    assert tagged_statement("<answer>5</answer> or 6") is None


def test_statements_behind_a_box_end_at_the_next_question() -> None:
    text = "[box] The answer is 6. The answer is as follows.\nQuestion: 2+2?\nThe answer is 4."
    assert statements_behind(text, 5) == [("6",)]


def test_a_unit_per_answer_is_no_statement() -> None:
    assert phrase_statements("24 answers * 2 points/answer = 48") is None


def test_a_result_is_a_weaker_statement() -> None:
    assert phrase_statements("The result is 5.") is None
    assert result_statements("The result is 5.") == [("5",)]


def test_values_in_answer_tags_contradict_another_statement() -> None:
    assert tagged_values("<answer>7</answer> then <answer> 8 apples</answer>") == ["7", "8 apples"]
    assert tagged_values(r"<answer>\boxed{7}</answer><answer>#### 7</answer><answer>so</answer>") == []


@pytest.mark.parametrize(
    ("before", "value"),
    [
        ("The answer is 7. ", "7"),
        ("Answer: **7**\n", "7"),
        ("The answer is 7, so ", "7"),
        ("The answer is 7 per day. ", None),
    ],
)
def test_an_answer_directly_before_a_box_is_found(before: str, value: str | None) -> None:
    assert value_stated_before(f"{before}[5]", len(before)) == value

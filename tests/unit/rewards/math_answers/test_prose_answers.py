r"""The final statements of a completion without a box."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.math_answers.prose_answers import prose_answers, stated_word


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("We add.\n#### 42", ["42"]),
        ("We add.\n#### 42 or 41", ["42 or 41"]),
        ("#### 4\n#### 5", ["4", "5"]),
        ("#### Step 1\nAdd.\n#### 5", ["5"]),
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

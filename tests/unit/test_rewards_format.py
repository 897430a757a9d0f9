"""`format`: each kind accepts its shape and refuses the near misses."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.format import answer_format


@pytest.mark.parametrize("answer", ["72", "-72", "1,080", "12.5", "$5", "-$1,234.50", "\u22125"])
def test_gsm8k_accepts_one_marked_number_on_the_last_line(answer: str) -> None:
    assert answer_format("", f"3 + 4 = 7\n#### {answer}\n \n", "") == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "72",
        "####72",
        "#### ",
        "#### 72 apples",
        "so #### 72",
        "##### 72",
        "#### 72\nDone.",
        "#### 71\n#### 72",
        "#### 1,08",
        "#### 72.",
        "#### 7 2",
        "#### 72####",
    ],
)
def test_gsm8k_refuses_everything_else(completion: str) -> None:
    assert answer_format("", completion, "72") == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"so $\boxed{72}$.", 1.0),
        (r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{a \} b}", 1.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{72", 0.0),
        (r"\boxed{\frac{1}{2}", 0.0),
        (r"\boxed{1} and \boxed{2}", 0.0),
        ("72", 0.0),
    ],
)
def test_boxed_wants_exactly_one_closed_box_with_contents(completion: str, expected: float) -> None:
    assert answer_format("", completion, "", kind="boxed") == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a\nb</think>\n<answer>72</answer>\n", 1.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<think></think><answer>72</answer>", 0.0),
        ("<think>a</think> so <answer>72</answer>", 0.0),
        ("<think>a</think><answer>72</answer> done", 0.0),
        ("<answer>72</answer><think>a</think>", 0.0),
        ("<think>a<think>b</think><answer>72</answer>", 0.0),
        ("<think>a</think><answer>72", 0.0),
    ],
)
def test_think_answer_wants_both_parts_once_and_nothing_around(completion: str, expected: float) -> None:
    assert answer_format("", completion, "", kind="think_answer") == expected


def test_a_pattern_is_searched_and_needs_no_kind() -> None:
    assert answer_format("", "a yes b", "", pattern=r"\byes\b") == 1.0
    assert answer_format("", "yesterday", "", pattern=r"\byes\b") == 0.0
    assert answer_format("", "yes", "", kind="regex", pattern="^yes$") == 1.0

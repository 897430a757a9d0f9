"""Each kind of `format` accepts its format and rejects near misses."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.builtin.format import answer_format
from grpo_mega.types import UserError


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
        "#### 0,108",
        "#### \u0667\u0662",
        "#### 72 or 73",
        "#### 72%",
        "#### 72.",
        "#### 7 2",
        "#### 72####",
    ],
)
def test_gsm8k_rejects_everything_else(completion: str) -> None:
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
def test_boxed_requires_exactly_one_closed_box_with_contents(completion: str, expected: float) -> None:
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
def test_think_answer_requires_both_parts_once_and_nothing_around(completion: str, expected: float) -> None:
    assert answer_format("", completion, "", kind="think_answer") == expected


def test_a_pattern_is_searched_and_needs_no_kind() -> None:
    assert answer_format("", "a yes b", "", pattern=r"\byes\b") == 1.0
    assert answer_format("", "yesterday", "", pattern=r"\byes\b") == 0.0
    assert answer_format("", "yes", "", kind="regex", pattern="^yes$") == 1.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>2 + 2</think>It is 4.", 1.0),
        ("\n<think>2 + 2</think>\n\n4\n", 1.0),
        ("<think>2 + 2</think>", 0.0),
        ("<think> </think>4", 0.0),
        ("So <think>2 + 2</think>4", 0.0),
        ("<think>2 <think> 2</think>4", 0.0),
        ("<think>2</think>4<think>5</think>", 0.0),
        ("2 + 2</think>4", 0.0),
        ("4", 0.0),
    ],
)
def test_think_requires_a_thought_and_then_an_answer(completion: str, expected: float) -> None:
    assert answer_format("", completion, "", kind="think") == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<plan>a</plan>\n<code>b</code>", 1.0),
        ("<plan>a</plan> then <code>b</code>", 0.0),
        ("<code>b</code><plan>a</plan>", 0.0),
        ("<plan>a</plan>", 0.0),
        ("<plan>a<code>b</code></plan>", 0.0),
        ("<plan></plan><code>b</code>", 0.0),
        ("<plan>a</plan><code>b</code><code>c</code>", 0.0),
    ],
)
def test_each_tag_must_occur_once_and_in_order(completion: str, expected: float) -> None:
    assert answer_format("", completion, "", kind="tags", tags=["plan", "code"]) == expected


OPENED = "<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    ("kind", "completion", "expected"),
    [
        ("think", "2 + 2</think>It is 4.", 1.0),
        ("think", "2 + 2</think>", 0.0),
        ("think", "</think>4", 0.0),
        ("think", "It is 4.", 0.0),
        ("think", "<think>2 + 2</think>4", 0.0),  # the prompt opened the thought already
        ("think_answer", "2 + 2</think><answer>4</answer>", 1.0),
        ("think_answer", "2 + 2</think>4", 0.0),
        ("tags", "2 + 2</think><plan>4</plan>", 1.0),
        ("tags", "<plan>4</plan>", 0.0),
    ],
)
def test_a_tag_that_the_prompt_opened_belongs_to_the_completion(kind: str, completion: str, expected: float) -> None:
    args: dict[str, Any] = {"tags": ["think", "plan"]} if kind == "tags" else {}
    assert answer_format(OPENED, completion, "", kind=kind, **args) == expected
    assert answer_format("assistant\n", completion, "", kind=kind, **args) in (0.0, 1.0 - expected)
    assert answer_format("Write <think> first.", completion, "", kind=kind, **args) in (0.0, 1.0 - expected)


def test_a_tag_that_the_format_does_not_name_is_not_added() -> None:
    assert answer_format("<plan>", "a</plan>", "", kind="tags", tags=["plan"]) == 1.0
    assert answer_format("<other>", "<plan>a</plan>", "", kind="tags", tags=["plan"]) == 1.0


@pytest.mark.parametrize(("kind", "answer"), [("gsm8k", "#### 72"), ("boxed", r"\boxed{72}")])
def test_a_formatted_answer_in_the_thought_does_not_count(kind: str, answer: str) -> None:
    assert answer_format("", f"<think>{answer}</think>\n{answer}", "", kind=kind) == 1.0
    assert answer_format("", f"<think>\n{answer}", "", kind=kind) == 0.0
    assert answer_format(OPENED, answer, "", kind=kind) == 0.0
    assert answer_format("", f"<think>a</think>{answer}</think>", "", kind="think") == 0.0


@pytest.mark.parametrize("blank", ["\u200b", "\u2060 \ufeff", "\u3000\u00ad", "\0"])
def test_invisible_characters_are_no_content(blank: str) -> None:
    assert answer_format("", f"\\boxed{{{blank}}}", "", kind="boxed") == 0.0
    assert answer_format("", f"<think>{blank}</think>4", "", kind="think") == 0.0
    assert answer_format("", f"<think>a</think>{blank}", "", kind="think") == 0.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"kind": "tags"}, "kind='tags' with tags=None"),
        ({"tags": ["a"]}, "kind=None with tags="),
        ({"kind": "tags", "tags": "think"}, "tags='think' must be a list of names"),
        ({"kind": "tags", "tags": ["a b"]}, "must be a list of names"),
        ({"kind": "tags", "tags": ["a", "a"]}, "names a tag twice"),
    ],
)
def test_bad_tags_are_rejected_before_the_run(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_rewards([RewardTerm(name="format", args=args)])

"""The answer of a completion is what stands outside of its thoughts, also when the prompt opened the thought."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.thought import answer_part, opened_tag, with_opened_tag

OPENED = "<|im_start|>assistant\n<think>\n"
PLAIN = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "completion", "answer"),
    [
        (PLAIN, "It is 4.", "It is 4."),
        (PLAIN, "<think>3?</think>4", " 4"),
        (PLAIN, "4 <think>3?", "4 "),
        (PLAIN, "<think>3</think>4<think>5</think>6", " 4 6"),
        (PLAIN, "<think>3 <think> 3</think>4", " 4"),
        (PLAIN, "<think>3</think>4</think>5", " 4 5"),
        (PLAIN, "<thinking>3 </think> 3</thinking>4", " 4"),
        (PLAIN, "3</think>4", "4"),
        (PLAIN, "3</think><think>4", ""),
        (PLAIN, "<reasoning>3</reasoning><answer>4</answer>", " <answer>4</answer>"),
        (PLAIN, "", ""),
        (OPENED, "3?</think>4", " 4"),
        (OPENED, "It is 4.", ""),
        (OPENED, "3 <think> 3</think>4", " 4"),
        ("Think in <think> tags.", "4", "4"),
        (PLAIN, "<think>a</think>```py\nprint('</think>')\n```", " ```py\nprint('</think>')\n```"),
        (PLAIN, "```py\nprint('<think>')\n```\n4", "```py\nprint('<think>')\n```\n4"),
        (PLAIN, "```py\nprint('</think>')\n```", "```py\nprint('</think>')\n```"),
        (PLAIN, "```py\nprint('<think>')\nprint(1)", "```py\nprint('<think>')\nprint(1)"),
        (PLAIN, "```py\na\n```\n<think>3</think>4", "```py\na\n```\n 4"),
        (PLAIN, "```py\nbad\n</think>\n```\n4\n```", "\n```\n4\n```"),
        (PLAIN, "<think>\n```py\nbad\n</think>\n4", " \n4"),
        (OPENED, "```py\nprint('</think>')\n```", " ')\n```"),  # the thought is open, and the fence is a part of it
        (OPENED, "```py\nbad\n</think>\n```py\n'<think>'\n```", " \n```py\n'<think>'\n```"),
    ],
)
def test_the_answer_is_the_text_outside_of_thoughts(prompt: str, completion: str, answer: str) -> None:
    assert answer_part(prompt, completion) == answer


@pytest.mark.parametrize(
    ("prompt", "tag"),
    [
        (OPENED, "think"),
        ("Go!<plan>", "plan"),
        ("<think>\n\n</think>\n\n", None),
        ("<think> in tags", None),
        ("<|im_start|>", None),
        ("", None),
        ("<think>" + " " * 1000, None),
    ],
)
def test_a_tag_is_open_if_the_prompt_ends_with_it(prompt: str, tag: str | None) -> None:
    assert opened_tag(prompt) == tag


def test_the_opened_tag_is_put_before_the_completion() -> None:
    assert with_opened_tag(OPENED, "a</think>b") == "<think>a</think>b"
    assert with_opened_tag(OPENED, "a</think>b", ("plan",)) == "a</think>b"
    assert with_opened_tag(PLAIN, "a</think>b") == "a</think>b"


def test_many_tags_take_linear_time() -> None:
    assert answer_part("", "<think>" * 100_000) == ""
    assert answer_part("", "```\n" + "'<think>'\n" * 50_000 + "```") != ""
    assert answer_part("", "```\n```\n<think></think>\n" * 20_000) != ""
    assert answer_part("", "```a\n<think></think>\n" * 20_000) != ""
    assert set(answer_part("", "<think></think>" * 100_000)) == {" "}


@pytest.mark.parametrize("tag", ["THINK", "Think", "think ", " think", "Reasoning"])
def test_a_tag_is_recognized_in_any_case_and_with_spaces(tag: str) -> None:
    assert answer_part("", f"<{tag}>5</{tag}>").strip() == ""
    assert answer_part("", f"<{tag}>5").strip() == ""
    assert answer_part("<THINK>", "5</think> 6").strip() == "6"

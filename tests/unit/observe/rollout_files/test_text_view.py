"""Rollouts for a terminal: side by side, and no character that a terminal executes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_mega.observe.rollout_files.reader import read_rows
from grpo_mega.observe.rollout_files.text_view import escape, render
from tests.helpers.step_columns import write_step


def row_of(folder: Path, **changed: Any) -> dict[str, Any]:
    (row,) = read_rows(write_step(folder, 12, [changed]))
    return row


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b2J\x07\x7f\x00\r", "\\x9b2J\\x07\\x7f\\x00\\r"),
        ("a\u202eb\u2066\ufeff", "a\\u202eb\\u2066\\ufeff"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("\ud800", "\\ud800"),
        ("naïve 日本 \t😀\n", "naïve 日本     😀\n"),
    ],
)
def test_characters_that_are_not_printable_are_escaped(text: str, shown: str) -> None:
    assert escape(text) == shown


def test_prompt_and_completion_are_side_by_side(tmp_path: Path) -> None:
    row = row_of(tmp_path, prompt="one two\nthree", completion="first second third\n\nlast")
    lines = render(row, 63).splitlines()
    assert lines[0] == ("step 12, group 0, member 0: reward 1, exact 1, advantage +0.500, 3 tokens, eos, answer 46")
    assert lines[1:] == [
        f"{'one two':<30} | first second third",
        f"{'three':<30} |",
        f"{'':<30} | last",
    ]


def test_long_and_wide_words_are_cut_at_the_width(tmp_path: Path) -> None:
    row = row_of(tmp_path, prompt="日" * 20, completion="x" * 65)
    lines = render(row, 63).splitlines()[1:]
    assert lines == [f"{'日' * 15} | {'x' * 30}", f"{'日' * 5}{' ' * 20} | {'x' * 30}", f"{'':<30} | {'x' * 5}"]


def test_a_narrow_terminal_shows_them_one_below_the_other(tmp_path: Path) -> None:
    assert render(row_of(tmp_path), 40).splitlines()[1:] == ["prompt:", "12+34=", "completion:", "46"]


def test_texts_of_the_first_line_are_escaped_and_stay_on_it(tmp_path: Path) -> None:
    row = row_of(tmp_path, answer="\x1b[2J\n1", reward=None, reward_failures=["judge"], num_turns=3)
    first, *_ = render(row, 80).splitlines()
    numbers = "reward none, exact 1, judge failed, advantage +0.500, 3 tokens, eos, 3 turns"
    assert first == f"step 12, group 0, member 0: {numbers}, answer \\x1b[2J 1"

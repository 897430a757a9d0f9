"""Counting of the prompts of a run that carries rollouts."""

from __future__ import annotations

import pytest

from grpo_mega.cli.prompt_use import PromptUse


@pytest.mark.parametrize(
    ("trained", "carried", "problems"),
    [
        ([1, 0, 3], [2, 4], []),
        ([1, 0, 3], [4], ["1 prompts were lost, the first is 2"]),
        ([1, 0, 3, 1], [2, 4], ["1 prompts were used more than once, the first is 1"]),
        ([1, 0, 3], [2, 4, 3], ["1 prompts were used more than once, the first is 3"]),
        (
            [1, 0, 9],
            [2, 4],
            ["1 prompts were lost, the first is 3", "1 prompts were never begun, but used, the first is 9"],
        ),
    ],
)
def test_every_begun_prompt_is_trained_once_or_carried(
    trained: list[int], carried: list[int], problems: list[str]
) -> None:
    assert PromptUse(range(5), trained, carried).problems() == problems

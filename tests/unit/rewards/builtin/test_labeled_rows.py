"""Rewards compared with rows that a reviewer labeled by hand, attacks and honest answers, in files next to this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.rewards.builtin.code import program_of
from grpo_mega.rewards.builtin.countdown import countdown
from grpo_mega.rewards.builtin.exact import exact
from grpo_mega.rewards.builtin.format import answer_format
from grpo_mega.rewards.builtin.gsm8k import gsm8k
from grpo_mega.rewards.builtin.json_schema import json_schema
from grpo_mega.rewards.builtin.language import language_consistency
from grpo_mega.rewards.builtin.length import length
from grpo_mega.rewards.builtin.math import math
from grpo_mega.rewards.thought import answer_part

REWARDS = {"countdown": countdown, "exact": exact, "gsm8k": gsm8k, "json_schema": json_schema}
ATTACKED = {
    "countdown": (countdown, 150),
    "exact": (exact, 120),
    "format": (answer_format, 140),
    "json_schema": (json_schema, 90),
    "language_consistency": (language_consistency, 40),
    "length": (length, 25),
}
"""Reward, and the least number of its rows in labeled_attacks.jsonl, which were written from docs/rewards.md."""


def rows_of(name: str) -> list[dict[str, Any]]:
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", sorted(REWARDS))
@pytest.mark.parametrize("right", [0, 1])
def test_a_row_scores_its_label(name: str, right: int) -> None:
    rows = [row for row in rows_of("labeled_rows.jsonl") if (row["reward"], row["right"]) == (name, right)]
    assert len(rows) >= 9
    wrong = [
        (row["completion"], row["answer"])
        for row in rows
        if REWARDS[name](row["prompt"], row["completion"], row["answer"], **row["args"]) != right
    ]
    assert wrong == []


def test_every_recorded_case_of_math_is_right() -> None:
    """Completions on which graders of other systems were wrong; `source` names the report."""
    rows = rows_of("recorded_math_cases.jsonl")
    assert len(rows) == 64
    assert [row for row in rows if math("", row["completion"], row["answer"]) != row["right"]] == []


@pytest.mark.parametrize("name", sorted(ATTACKED))
def test_a_row_of_the_attacks_scores_its_value(name: str) -> None:
    function, least = ATTACKED[name]
    rows = [row for row in rows_of("labeled_attacks.jsonl") if row["reward"] == name]
    assert len(rows) >= least
    wrong = [
        (row["what"], row["value"], value)
        for row in rows
        if (value := function(row["prompt"], row["completion"], row["answer"], **row["args"]))
        != pytest.approx(row["value"], abs=1e-9)
    ]
    assert wrong == []


def test_the_program_of_an_answer_is_the_labeled_one() -> None:
    rows = rows_of("labeled_programs.jsonl")
    assert len(rows) >= 90
    found = [(row["what"], program_of(answer_part(row["prompt"], row["completion"]))) for row in rows]
    expected = [(row["what"], row["program"]) for row in rows]
    assert [(what, text.strip()) for what, text in found] == [(what, text.strip()) for what, text in expected]

"""Conditions on rollouts: by hand, against Python, and each error."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from grpo_mega.observe.rollout_files.arrow_table import record_batches
from grpo_mega.observe.rollout_files.where import select_rows
from grpo_mega.types import UserError
from tests.helpers.step_columns import columns_of

ROWS = (
    {"reward": 0.0, "completion": "because 1", "reward_components": {"exact": 0.0}},
    {"reward": 0.5, "completion": 'it\'s "two"', "reward_failures": ["judge"], "stop_reason": "length"},
    {"reward": None, "completion": "", "reward_components": {}},
    {"reward": 1.0, "completion": "naïve", "old_log_probs": None, "advantage": -0.5},
)


def table() -> pa.Table:
    return pa.Table.from_batches(record_batches(columns_of(*ROWS)))


@pytest.mark.parametrize(
    ("condition", "groups"),
    [
        ("reward<0.5", [0]),
        ("reward <= 5e-1", [0, 1]),
        ("reward = 1", [3]),
        ("reward==1 or group == 2", [2, 3]),
        ("reward != 1.0", [0, 1]),
        ("not reward < 0.5", [1, 3]),
        ("reward is null", [2]),
        ("reward is not null and not (group in (0, 1))", [3]),
        ("old_log_probs is null", [3]),
        ("completion contains 'because'", [0]),
        ('completion contains "it\'s"', [1]),
        ("completion contains '\\'s'", [1]),
        ("completion contains 'be.ause'", []),
        ("completion = ''", [2]),
        ("reward_failures contains 'judge'", [1]),
        ("reward_components.exact < 1", [0]),
        ("reward_components.exact is null", [2]),
        ("reward_components.unknown > 0", []),
        ("len(completion) = 5", [3]),
        ("len(reward_failures) > 0", [1]),
        ("len(completion_ids) >= 3", [0, 1, 2, 3]),
        ("stop_reason in ('length', 'stop')", [1]),
        ("advantage<-0.25", [3]),
        ("0.5 > reward", [0]),
        ("1 < 2 and true = true", [0, 1, 2, 3]),
        ("group = 0 or group = 1 and reward = 7", [0]),
        ("(group = 0 or group = 1) and reward = 7", []),
    ],
)
def test_a_condition_selects_the_rows_for_which_it_is_true(condition: str, groups: list[int]) -> None:
    assert select_rows(table(), condition).column("group").to_pylist() == groups


def test_random_conditions_select_what_python_selects() -> None:
    draw = random.Random(0)
    rows = [{"member": draw.randrange(4), "num_turns": draw.randrange(4)} for _ in range(40)]
    given = pa.Table.from_batches(record_batches(columns_of(*rows)))

    def condition(depth: int) -> str:
        if depth == 0:
            operator = draw.choice(["<", "<=", ">", ">=", "==", "!="])
            return f"{draw.choice(['member', 'num_turns'])} {operator} {draw.randrange(4)}"
        if draw.random() < 0.3:
            return f"not ({condition(depth - 1)})"
        return f"({condition(depth - 1)}) {draw.choice(['and', 'or'])} {condition(depth - 1)}"

    for _ in range(100):
        text = condition(draw.randrange(4))
        expected = [i for i, row in enumerate(rows) if eval(text, {}, row)]
        assert select_rows(given, text).column("group").to_pylist() == expected, text


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("", r"it ends where a column or a value is needed"),
        ("reward <", r"it ends where a column or a value is needed"),
        ("rewrd < 1", r"'rewrd' is not a column; did you mean reward\?"),
        ("zzzzzz < 1", r"'zzzzzz' is not a column; its columns are step, group"),
        ("reward", r"it ends after reward, where an operator is needed; use <"),
        ("reward 1", r"it has '1' after reward, where an operator is needed"),
        ("reward < 'a'", r"reward is a number and 'a' is a text; they cannot be compared"),
        ("completion_ids = 3", r"completion_ids is a list and 3 is a number; they cannot be compared"),
        ("reward < 1 reward", r"'reward' was not expected; write `and` or `or`"),
        ("(reward < 1", r"'\)' is missing before the end"),
        ("reward in 1", r"'\(' is missing before '1'"),
        ("completion contains 3", r"3 must be a text in quotes after `contains`"),
        ("reward contains 'a'", r"reward is not a text"),
        ("len(reward) > 1", r"len\(reward\): reward is a number"),
        ("reward < 1; drop", r"'; drop' cannot be read"),
        ("__import__('os').system('true')", r"\.system\('true'\).* cannot be read"),
        ("__import__('os')", r"'__import__' is not a column"),
        ("completion = 'open", r"\"'open\" cannot be read"),
        ("not " * 200 + "reward < 1", r"more than 100 nested"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_why(condition: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_rows(table(), condition)
    with pytest.raises(UserError, match=message):
        select_rows(table().slice(0, 0), condition)

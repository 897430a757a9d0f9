"""Values from YAML that cannot be passed on as plain data: each is rejected with its key."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from grpo_mega.config.json_values import reject_endless_values, require_json_values
from grpo_mega.types import UserError


def read(text: str) -> Any:
    return yaml.safe_load(text)


def message_of(text: str, *, text_keys: bool = True) -> str:
    with pytest.raises(UserError) as raised:
        require_json_values("reward.terms[0].args", read(text), text_keys=text_keys)
    return str(raised.value)


def test_values_that_json_returns_unchanged_are_accepted() -> None:
    values = read("{a: [1, 1.5, true, null, text, .inf], b: {c: {d: []}}, e: &x [1], f: [*x, *x]}")
    assert json.loads(json.dumps(values)) == values
    require_json_values("args", values)
    reject_endless_values(values)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{since: 2026-01-02}", ["args.since=2026-01-02", "type date", 'put quotes around it: "2026-01-02"']),
        ("{since: [2026-01-02 03:04:05]}", ["args.since[0]=", "type datetime", '"2026-01-02 03:04:05"']),
        ("{tags: !!set {a, b}}", ["args.tags=", "type set", "lists"]),
        ("{pairs: !!omap [a: 1]}", ["args.pairs[0]=", "type tuple"]),
        ("{key: !!binary aGVsbG8=}", ["args.key=b'hello'", "type bytes"]),
        ("{levels: {1: low}}", ["args.levels: the key 1", "must be text", 'put quotes around it: "1"']),
        ("{levels: [{true: low}]}", ["args.levels[0]: the key True"]),
        ("{a: &x {b: *x}}", ["args.a.b", "YAML alias", "without an alias"]),
        ("{a: &x [1, *x]}", ["args.a[1]", "YAML alias"]),
    ],
)
def test_a_value_that_json_would_change_is_rejected_with_its_key(text: str, parts: list[str]) -> None:
    message = message_of(text)
    assert message.startswith("reward.terms[0].args.")
    assert [part for part in parts if part not in message] == [], message


def test_numbers_as_keys_are_accepted_only_where_they_may_be() -> None:
    require_json_values("engine.args", read("{rope: {1: 2, 0.5: 3}}"), text_keys=False)
    assert "the key datetime.date(2026, 1, 2)" in message_of("{rope: {2026-01-02: 3}}", text_keys=False)


def test_a_value_with_many_aliases_is_visited_once_per_part() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    values = read("\n".join(lines))  # 9 ** 39 parts if aliases were followed each time
    require_json_values("args", values)
    reject_endless_values(values)


def test_an_alias_anywhere_in_a_config_that_stands_inside_its_own_value_is_rejected() -> None:
    with pytest.raises(UserError, match=r"^model\.a\[0\]\.b: this YAML alias"):
        reject_endless_values(read("{model: {a: &x [{b: *x}]}}"))

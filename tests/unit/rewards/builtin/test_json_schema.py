"""`json_schema` accepts only JSON that is valid under the schema of the term or of the prompt."""

from __future__ import annotations

import json

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.builtin.json_schema import json_schema
from grpo_mega.types import UserError

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"name": "Ann", "age": 3}', 1.0),
        (' \n{"name": "Ann"}\n', 1.0),
        ('Here:\n```json\n{"name": "Ann"}\n```\nDone.', 1.0),
        ('```\n{"name": "Ann"}\n```', 1.0),
        ('Here: ```json\n{"name": "Ann"}\n``` done', 1.0),
        ('Here: ```json\n{"name": "Ann"}\n```\n', 1.0),
        ('Here: ```json\n{"name": "Ann"}\n``` or\n{}', 0.0),
        ('{"name": "Ann", "age": -3}', 0.0),
        ('{"name": "Ann", "age": 1e400}', 0.0),
        ('{"name": "Ann", "age": NaN}', 0.0),
        ('{"age": 3}', 0.0),
        ('{"name": "Ann"} and more', 0.0),
        ('```json\n{"name": "Ann"}\n```\n```json\n{}\n```', 0.0),
        ('~~~~ JSON\n{"name": "Ann"}\n~~~~', 1.0),
        ('- Here:\n  ```json\n  {"name": "Ann"}\n  ```\n', 1.0),
        ('<think>{}</think>\n{"name": "Ann"}', 1.0),
        ('<think>\n```json\n{"name": "Ann"}\n```', 0.0),
        ('<think>{"name": "Ann"}</think>{}', 0.0),
        ('{"name": "Ann", "name": "Bob"}', 0.0),
        ('{"name": 1, "name": "Ann"}', 0.0),
        ('{"name": "Bob"} or\n```json\n{"name": "Ann"}\n```', 0.0),
        ('```json\n{"name": "Ann"}', 0.0),
        ('```python\n{"name": "Ann"}\n```', 0.0),
        ('{"name": "Ann", "age": \uff13}', 0.0),
        ('{"name": "Ann", "age": 1,000}', 0.0),
        ('{"name": "Ann", "age": 3.0}', 1.0),
        ('{"name": "Ann", "age": "3"}', 0.0),
        ('{"name": "Ann", "age": 3,}', 0.0),
        ('{"name": "Ann"}{"name": "Bob"}', 0.0),
        ("{'name': 'Ann'}", 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
        ("9" * 100_000, 0.0),
    ],
)
def test_only_json_that_fits_the_schema_scores_one(completion: str, expected: float) -> None:
    assert json_schema("", completion, "", schema=SCHEMA) == expected
    assert json_schema("", completion, json.dumps(SCHEMA)) == expected


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        ("^a+$", "aa", "aa\n"),
        (r"^\d+$", "12", "\u0663"),
        (r"^\w$", "a", "é"),
        (r"^[$]\$$", "$$", "$"),
        (r"^(?<first>a|b)(?=c)c$", "bc", "b"),
        ("a$|b$", "xa", "xa\n"),
        ("^[^]$]$", "a", "$"),
    ],
)
def test_patterns_are_those_of_ecmascript(pattern: str, right: str, wrong: str) -> None:
    key = {"type": "object", "patternProperties": {pattern: True, "^x$": True}, "additionalProperties": False}
    for text, value in ((right, 1.0), (wrong, 0.0)):
        assert json_schema("", json.dumps(text), "", schema={"type": "string", "pattern": pattern}) == value
        assert json_schema("", json.dumps({text: 1, "x": 2}), "", schema=key) == value


def test_only_keywords_are_translated() -> None:
    schema = {"properties": {"const": {"pattern": "a$"}, "pattern": {"enum": [{"pattern": "b$"}]}}}
    assert json_schema("", '{"const": "a", "pattern": {"pattern": "b$"}}', "", schema=schema) == 1.0
    assert json_schema("", '{"const": "a\\n"}', "", schema=schema) == 0.0


def test_a_pattern_that_python_cannot_compile_is_rejected_before_the_run() -> None:
    with pytest.raises(UserError, match=r"pattern '\\\\p\{L\}' is not supported"):
        build_rewards([RewardTerm(name="json_schema", args={"schema": {"pattern": r"\p{L}"}})])


@pytest.mark.parametrize(("number", "divisor", "expected"), [("0.3", 0.1, 1.0), ("0.35", 0.1, 0.0), ("1e400", 2, 0.0)])
def test_multiples_are_exact(number: str, divisor: float, expected: float) -> None:
    assert json_schema("", number, "", schema={"multipleOf": divisor}) == expected


def test_a_number_that_no_float_holds_is_checked_without_a_crash() -> None:
    assert json_schema("", "1" + "0" * 400, "", schema={"multipleOf": 0.01}) in (0.0, 1.0)


def test_a_reference_that_is_not_a_schema_is_an_error_of_the_data() -> None:
    for reference in ("", "7", '{"type": "thing"}'):
        with pytest.raises(ValueError, match=r"thing|not a JSON schema"):
            json_schema("", "{}", reference)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "thing"}, "'thing' is not valid"),
        ({"$ref": "https://example.org/schema.json"}, r"\$ref 'https://example.org/schema.json' was not found"),
        ({"$ref": "#/$defs/missing"}, "was not found"),
        ("{}", "schema='{}' must be an object"),
    ],
)
def test_a_schema_that_cannot_be_used_is_rejected_before_the_run(schema: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_rewards([RewardTerm(name="json_schema", args={"schema": schema})])


def test_a_pattern_that_backtracks_without_end_is_stopped() -> None:
    schema = {"type": "string", "pattern": "^(a+)+$"}
    assert json_schema("", json.dumps("a" * 40), "", schema=schema, cpu_seconds=0.2) == 1.0
    with pytest.raises(TimeoutError, match=r"cpu_seconds=0\.2"):
        json_schema("", json.dumps("a" * 60 + "!"), "", schema=schema, cpu_seconds=0.2)
    with pytest.raises(UserError, match="cpu_seconds=0"):
        build_rewards([RewardTerm(name="json_schema", args={"schema": schema, "cpu_seconds": 0})])

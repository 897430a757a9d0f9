"""A reward gets the inputs that its parameters name; a function of three other names gets them by position."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.base import needs_fields
from grpo_mega.rewards.inputs import INPUTS, ScoringRow, call_inputs
from grpo_mega.rewards.pool import RewardPool
from grpo_mega.types import UserError

ROW = ScoringRow(
    "<|user|>2+2<|end|>",
    "4",
    "four",
    messages=({"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2"}),
    completion_with_special_tokens="4<|end|>",
    fields={"level": 3, "tags": ["sum"]},
    dataset="sums",
    index=17,
)

USER_REWARDS = """
import json
from grpo_mega.rewards import reward

def check(**found):
    if any(found[name] != EXPECTED[name] for name in found): raise AssertionError(json.dumps(found))
    return 1.0

EXPECTED = {
    "prompt": "<|user|>2+2<|end|>", "completion": "4", "reference": "four", "dataset": "sums",
    "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2"}],
    "completion_with_special_tokens": "4<|end|>", "fields": {"level": 3, "tags": ["sum"]},
}

@reward(low=0.0, high=1.0)
def old(question, answer, truth, scale=1.0): return scale * check(prompt=question, completion=answer, reference=truth)

@reward(low=0.0, high=1.0)
def two(completion, reference): return check(completion=completion, reference=reference)

@reward(low=0.0, high=1.0)
def everything(completion, *, fields, messages, dataset, completion_with_special_tokens, reference, prompt, least=0):
    return check(fields=fields, messages=messages, dataset=dataset, reference=reference, prompt=prompt,
                 completion=completion, completion_with_special_tokens=completion_with_special_tokens) * (least == 2)

@reward(low=0.0, high=1.0)
def typo(compleption, reference): return 1.0
"""


@pytest.fixture(autouse=True)
def user_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "input_rewards.py").write_text(USER_REWARDS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (lambda prompt, completion, reference: 0, (), (True, ())),
        (lambda p, c, r: 0, (), (True, ())),
        (lambda _prompt, completion, truth, scale=1: 0, ("scale",), (True, ())),
        (lambda *texts: 0, (), (True, ())),
        (lambda prompt, completion, reference, **rest: 0, ("x",), (True, ())),
        (lambda prompt, completion, reference, fields=None: 0, (), (True, ("fields",))),
        (lambda prompt, completion, reference, dataset="": 0, ("dataset",), (True, ())),  # the config's value
        (lambda completion, reference: 0, (), (False, ("completion", "reference"))),
        (lambda completion, reference, scale: 0, ("scale",), (False, ("completion", "reference"))),
        (lambda completion, limit, reference: 0, (), (False, ("completion", "reference"))),
        (lambda prompt, completion, scale: 0, ("scale",), (False, ("prompt", "completion"))),
        (lambda completion: 0, (), (False, ("completion",))),
        (lambda *, dataset, completion: 0, (), (False, ("completion", "dataset"))),
        (lambda messages, completion, fields: 0, (), (False, ("completion", "messages", "fields"))),
    ],
)
def test_the_signature_decides_how_a_reward_is_called(
    function: Callable[..., Any], args: tuple[str, ...], expected: tuple[bool, tuple[str, ...]]
) -> None:
    assert call_inputs(function, dict.fromkeys(args, 1)) == expected, inspect.signature(function)


@pytest.mark.parametrize(("name", "args"), [("old", {"scale": 1.0}), ("two", {}), ("everything", {"least": 2})])
def test_a_reward_gets_the_same_inputs_here_and_in_a_worker(name: str, args: dict[str, Any]) -> None:
    term = RewardTerm(name=f"input_rewards:{name}", args=args)
    (component,) = build_rewards([term])
    assert component.score(ROW) == 1.0
    with RewardPool([term], workers=1, timeout_seconds=60.0) as pool:
        pool.submit_row(0, ROW)
        found = pool.collect()[0]
    assert (found.value, found.failures) == (1.0, ())


def test_unknown_messages_and_special_tokens_are_made_from_the_texts() -> None:
    row = ScoringRow("2+2", "4", "four")
    assert [row.input(name) for name in INPUTS] == [
        "2+2", "4", "four", [{"role": "user", "content": "2+2"}], "4", {}, ""
    ]  # fmt: skip


def test_the_completion_continues_a_last_message_of_the_assistant() -> None:
    user, begun = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "It is "}
    assert ScoringRow("", "4", "", messages=(user,)).conversation == [user, {"role": "assistant", "content": "4"}]
    row = ScoringRow("", "4", "", messages=(user, begun))
    assert row.conversation == [user, {"role": "assistant", "content": "It is 4"}]
    assert begun["content"] == "It is "


def test_a_parameter_that_is_neither_an_input_nor_an_argument_is_an_error_before_the_run() -> None:
    with pytest.raises(UserError, match=r"missing a required argument: 'compleption'"):
        build_rewards([RewardTerm(name="input_rewards:typo")])


def test_the_columns_of_the_data_are_loaded_only_for_a_reward_that_reads_them() -> None:
    assert not needs_fields(build_rewards([RewardTerm(name="gsm8k"), RewardTerm(name="input_rewards:two")]))
    assert needs_fields(build_rewards([RewardTerm(name="gsm8k"), RewardTerm(name="input_rewards:everything")]))


def test_a_description_names_the_row_and_its_data_set_if_there_is_one() -> None:
    assert ROW.description.startswith("row 17 of data set sums, prompt=")
    assert replace(ROW, dataset="").description.startswith("row 17, prompt=")
    assert replace(ROW, index=None, dataset="").description.startswith("a row, prompt=")

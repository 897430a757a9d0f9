"""Names, arguments and ranges of rewards are checked before a run starts."""

from __future__ import annotations

import datetime as dt
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import BUILTIN_REWARDS, RewardComponent, build_rewards, reward
from grpo_mega.types import UserError

USER_REWARDS = """
from grpo_mega.rewards import reward

@reward(low=-1.0, high=2.0)
def length(prompt, completion, reference, scale=1.0):
    return min(2.0, len(completion) * scale)

def undeclared(prompt, completion, reference, value=1.0):
    return value
"""


@pytest.fixture
def user_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_rewards_base.py").write_text(USER_REWARDS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "user_rewards_base"


def error_message(*terms: RewardTerm) -> str:
    with pytest.raises(UserError) as caught:
        build_rewards(terms)
    return str(caught.value)


def test_every_builtin_reward_is_a_function_of_its_name_that_declares_a_range() -> None:
    for name, path in BUILTIN_REWARDS.items():
        module, _, attribute = path.partition(":")
        declaration = vars(getattr(importlib.import_module(module), attribute))["__reward_declaration__"]
        assert declaration.low in (-1.0, 0.0)
        assert declaration.high == declaration.low + 1.0
        assert declaration.check_args is not None or name == "exact"


@pytest.mark.parametrize("separator", [":", "."])
def test_a_dotted_path_finds_a_users_reward_with_its_range_and_args(user_rewards: str, separator: str) -> None:
    term = RewardTerm(name=f"{user_rewards}{separator}length", weight=0.5, args={"scale": 0.25})
    (component,) = build_rewards([term])
    assert (component.name, component.low, component.high, component.weight) == ("length", -1.0, 2.0, 0.5)
    assert component("", "abc", "") == 0.75


def test_the_error_for_an_unknown_name_suggests_the_nearest_name() -> None:
    message = error_message(RewardTerm(name="exact"), RewardTerm(name="gsmk8"))
    assert message.startswith("reward.terms[1].name='gsmk8' is not a known reward, did you mean 'gsm8k'?")
    assert ", ".join(sorted(BUILTIN_REWARDS)) in message


def test_the_error_for_an_unknown_argument_lists_the_known_arguments() -> None:
    message = error_message(RewardTerm(name="gsm8k", args={"stric": True}))
    assert "reward.terms[0].args={'stric': True}" in message
    assert "did you mean 'strict'?" in message
    assert "it takes: strict" in message
    assert "it takes: no arguments" in error_message(RewardTerm(name="exact", args={"case": 1}))


@pytest.mark.parametrize(
    ("name", "args", "fragment"),
    [
        ("gsm8k", {"strict": "yes"}, "strict='yes' must be true or false"),
        ("format", {"kind": "xml"}, "kind='xml' is unknown; use one of gsm8k, boxed"),
        ("format", {"kind": "regex"}, "needs a pattern"),
        ("format", {"pattern": "(a"}, "is not a regular expression"),
        ("format", {"pattern": 5}, "is not a regular expression"),
        ("format", {"kind": "boxed", "pattern": "a"}, "has no effect with kind='boxed'"),
    ],
)
def test_a_wrong_argument_value_is_rejected_before_the_run(name: str, args: dict[str, object], fragment: str) -> None:
    message = error_message(RewardTerm(name=name, args=args))
    assert fragment in message
    assert message.startswith("reward.terms[0].args")


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (dt.date(2026, 1, 2), ["reward.terms[0].args.pattern=2026-01-02", 'put quotes around it: "2026-01-02"']),
        ({"a": {1: "b"}}, ["reward.terms[0].args.pattern.a: the key 1", 'put quotes around it: "1"']),
        ([b"bytes"], ["reward.terms[0].args.pattern[0]=b'bytes'", "bytes"]),
    ],
    ids=str,
)
def test_an_argument_that_does_not_survive_json_is_rejected_before_the_run(value: object, parts: list[str]) -> None:
    message = error_message(RewardTerm(name="format", args={"pattern": value}))
    assert [part for part in parts if part not in message] == [], message


def test_the_error_for_a_wrong_path_names_the_missing_part(user_rewards: str) -> None:
    assert "cannot import 'no_such_package.rewards'" in error_message(RewardTerm(name="no_such_package.rewards:f"))
    message = error_message(RewardTerm(name=f"{user_rewards}:lengths"))
    assert "has no function 'lengths'" in message
    assert "did you mean 'length'?; its rewards: length, undeclared" in message


def test_a_reward_without_a_decorator_has_the_range_0_to_1_and_leaves_failed_rollouts_out(user_rewards: str) -> None:
    (component,) = build_rewards([RewardTerm(name=f"{user_rewards}:undeclared", args={"value": 0.5})])
    assert (component.low, component.high, component.on_failure) == (0.0, 1.0, "drop")
    assert component("", "", "") == 0.5
    (beyond,) = build_rewards([RewardTerm(name=f"{user_rewards}:undeclared", args={"value": 3.0})])
    with pytest.raises(ValueError, match=r"returned 3\.0, outside the range \[0\.0, 1\.0\] .*@grpo_mega"):
        beyond("", "", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.helpers.plain_environments:asks_on", "has the decorator of another kind: environment"),
        ("pathlib:Path", "is not a Python function"),
        ("builtins:max", "is not a Python function"),
    ],
)
def test_what_is_no_reward_is_named_before_the_run(name: str, message: str) -> None:
    assert message in error_message(RewardTerm(name=name))


def test_an_empty_list_of_terms_is_rejected() -> None:
    assert "reward.terms is empty" in error_message()


def test_a_term_that_occurs_twice_gets_its_own_component_name() -> None:
    terms = [RewardTerm(name="format", args={"kind": kind}) for kind in ("gsm8k", "boxed", "think_answer")]
    assert [component.name for component in build_rewards(terms)] == ["format", "format_2", "format_3"]


@pytest.mark.parametrize("value", [None, "1.0", float("nan"), float("inf"), 1.5, -0.1, [1.0]])
def test_a_value_that_is_not_a_number_in_the_range_raises(value: object) -> None:
    component = RewardComponent("stub", lambda prompt, completion, reference: value, 0.0, 1.0, 1.0, {})
    with pytest.raises(ValueError, match="returned"):
        component("", "", "")


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (0.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_must_be_finite_and_not_empty(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="range must be finite"):
        reward(low=low, high=high)


def test_rewards_are_imported_without_torch_and_without_pydantic() -> None:
    modules = "grpo_mega.rewards.worker, " + ", ".join(
        f"grpo_mega.rewards.builtin.{m}" for m in ("gsm8k", "exact", "format")
    )
    code = f"import {modules}, sys; print([m for m in ('torch', 'pydantic', 'vllm', 'megatron') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_that_exits_while_it_is_imported_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "exits.py").write_text("raise SystemExit(0)")
    with pytest.raises(UserError, match=r"cannot import .*exits\.py' \(SystemExit: 0\)"):
        build_rewards([RewardTerm(name=f"{tmp_path}/exits.py:score")])

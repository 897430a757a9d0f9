"""Keys that supervised fine-tuning or reinforcement learning does not read are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_mega.config.load import config_from_values
from grpo_mega.config.schema import Config
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names


def config_of(*overrides: str, objective: str = "sft") -> Config:
    values: dict[str, Any] = {
        "model": {"path": "base"},
        "data": {"train": "train.jsonl", "max_example_tokens": 4096},
        "train": {"objective": objective, "steps": 3},
    }
    if objective == "rl":
        values["reward"] = {"terms": [{"name": "exact"}]}
    return config_from_values(values, overrides, [Path.cwd()])


def test_without_held_out_prompts_neither_an_engine_nor_a_reward_nor_a_reference_is_needed() -> None:
    config = config_of()
    assert config.is_sft
    assert not config.has_engine
    assert not config.needs_reference
    assert config.longest_training_rollout == 4096
    evaluated = config_of("data.eval=held_out.jsonl", "reward.terms=[{name: exact}]")
    assert evaluated.has_engine
    assert not evaluated.needs_reference


def test_with_held_out_prompts_a_reward_is_needed() -> None:
    with pytest.raises(UserError, match="reward: this key is required"):
        config_of("data.eval=held_out.jsonl")
    with pytest.raises(UserError, match=r"reward\.terms=\[\]"):
        config_of("data.eval=held_out.jsonl", "reward.terms=[]")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs_per_rollout=2", ("train.epochs_per_rollout=2", "leave")),
        ("algorithm.kl_coef=0.1", ("algorithm.kl_coef=0.1", "likelihood")),
        ("algorithm.name=dapo", ("algorithm.name=dapo", "train.objective=sft")),
        ("sampling.group_size=4", ("sampling.group_size=4",)),
        ("sampling.temperature=0.5", ("sampling.temperature=0.5", "evaluation.temperature")),
        ("reward.terms=[]; reward.shuffle=true", ("reward.shuffle=True",)),
        ("data.train=[{path: a.jsonl, max_prompt_tokens: 5}]", ("data.train[0].max_prompt_tokens=5",)),
        ("data.template=plain; data.messages_key=m", ("data.messages_key=m", "data.template=chat")),
        ("train.max_tokens_per_microbatch=4000", ("max_tokens_per_microbatch=4000", "data.max_example_tokens=4096")),
        ("evaluation.every=2", ("evaluation.every=2", "data.eval")),
    ],
)
def test_a_key_that_does_nothing_in_supervised_fine_tuning_is_an_error(override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        config_of(*override.split("; "))
    assert_names(caught.value, *words)


@pytest.mark.parametrize(
    "override",
    ["data.messages_key=m", "data.completion_key=c", "data.max_example_tokens=99", "data.overlong=truncate"],
)
def test_keys_of_examples_are_errors_in_reinforcement_learning(override: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(override, objective="rl")
    assert_names(caught.value, override, "train.objective=rl")


def test_experts_can_be_balanced_in_both() -> None:
    assert config_of("algorithm.aux_loss_coef=0.01").algorithm.aux_loss_coef == 0.01

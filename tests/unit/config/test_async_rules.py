"""Rules for `train.max_staleness`."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.config.schema import Config
from grpo_mega.config.shipped import find_config
from grpo_mega.types import UserError

ASYNCHRONOUS = (
    "train.max_staleness=8",
    "engine.placement=server",
    "engine.urls=[h:1]",
    "algorithm.correction=token_truncated",
)


def load(*changes: str) -> Config:
    return load_config(find_config(Path("quickstart")), [*ASYNCHRONOUS, *changes])


def test_servers_with_a_correction_are_accepted() -> None:
    assert load().is_asynchronous
    assert not load("train.max_staleness=0").is_asynchronous
    assert load("algorithm.name=rloo").algorithm.surrogate == "policy_gradient"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["engine.placement=colocated", "engine.urls=[]"],
            "engine.placement=colocated: engine and policy use the same",
        ),
        (["sampling.partial={max_staleness: 8}"], "sampling.partial: servers continue all open rollouts"),
        (["sampling.prompts_per_wave=4"], "sampling.prompts_per_wave=4: all open rollouts"),
        (["guard.rules.gradient_spike=rollback"], "a rule of guard.rules with the action rollback: a rollback cont"),
        (
            ["algorithm.old_log_probs=sampler", "algorithm.correction=token_masked"],
            "algorithm.old_log_probs=sampler: its ratio would be clipped around",
        ),
        (["algorithm.correction=null"], "algorithm.correction=null: the weights that sampled a token are older"),
        (
            ["algorithm.name=rloo", "algorithm.correction=token_masked"],
            "algorithm.name=rloo: algorithm.surrogate=policy_gradient with algorithm.correction=token_masked: this",
        ),
    ],
)
def test_what_does_not_work_with_staleness_is_an_error_with_its_reason(changes: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(*changes)
    assert str(caught.value).startswith(f"train.max_staleness=8 is not supported with {message}")


def test_a_slice_without_staleness_is_an_error() -> None:
    with pytest.raises(UserError, match=r"train\.slice_tokens=4 does nothing with train\.max_staleness=0"):
        load("train.slice_tokens=4", "train.max_staleness=0")
    assert load("train.slice_tokens=4").background_slice_tokens == 4
    assert load("sampling.max_tokens=900").background_slice_tokens == 56


def test_a_staleness_below_the_updates_of_a_step_is_an_error() -> None:
    with pytest.raises(UserError, match=r"train\.max_staleness=7 is less than the updates of a step"):
        load("train.max_staleness=7")

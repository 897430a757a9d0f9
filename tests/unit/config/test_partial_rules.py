"""Rules for `sampling.partial`."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.config.shipped import find_config
from grpo_mega.types import UserError

PARTIAL = "sampling.partial={slice_tokens: 16, max_staleness: 8}"
LONG = "sampling.max_tokens=40"


def load(*changes: str) -> object:
    return load_config(find_config(Path("quickstart")), [LONG, PARTIAL, *changes])


def test_partial_rollouts_with_their_defaults_are_accepted() -> None:
    assert load("sampling.max_tokens=1600", "sampling.partial={max_staleness: 8}").sampling.slice_tokens == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["sampling.prompts_per_wave=4"], "sampling.partial is not supported with sampling.prompts_per_wave=4"),
        (["algorithm.old_log_probs=sampler"], "sampling.partial is not supported with algorithm.old_log_probs=sampler"),
        (["engine.placement=server", "engine.urls=[h:1]"], "sampling.partial is not supported with engine.placement=s"),
        (
            ["guard.rules.gradient_spike=rollback"],
            "sampling.partial is not supported with a rule of guard.ru",
        ),
        (["sampling.max_tokens=16"], "sampling.partial.slice_tokens=16 must be less than sampling.max_tokens=16"),
        (["sampling.partial={max_staleness: 7}"], "sampling.partial.max_staleness=7 is less than the updates of a st"),
        (["sampling.partial={max_staleness: 8, oversubmit: 0.9}"], "sampling.partial.oversubmit=0.9"),
        (["sampling.partial={max_staleness: 8, oversubmit: 1}"], "sampling.partial.oversubmit=1"),
        (["sampling.partial={}"], "sampling.partial.max_staleness"),
    ],
)
def test_what_does_not_work_or_does_nothing_is_an_error(changes: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(*changes)
    assert str(caught.value).startswith(message)

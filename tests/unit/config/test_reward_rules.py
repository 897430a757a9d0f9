"""Rules for `reward.terms[].datasets`."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.config.shipped import find_config
from grpo_mega.types import UserError

SETS = "data.train=[{path: gsm8k.jsonl}, {path: countdown.jsonl, name: numbers}]"
EVAL = "data.eval=[{path: held_out.jsonl, name: gsm8k}]"


def problem(terms: str, *more: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(find_config(Path("quickstart")), [SETS, EVAL, f"reward.terms={terms}", *more])
    return str(caught.value)


def test_terms_that_cover_every_set_are_accepted() -> None:
    terms = "[{name: gsm8k, datasets: [gsm8k]}, {name: countdown, datasets: [numbers]}, {name: format, weight: 0.1}]"
    config = load_config(find_config(Path("quickstart")), [SETS, EVAL, f"reward.terms={terms}"])
    assert [term.datasets for term in config.reward.terms] == [("gsm8k",), ("numbers",), None]


def test_an_unknown_set_is_an_error_that_names_the_nearest() -> None:
    message = problem("[{name: exact}, {name: countdown, datasets: [numbrs]}]")
    assert message.startswith("reward.terms[1].datasets: 'numbrs' is not a set")
    assert "did you mean 'numbers'?" in message
    assert "gsm8k, numbers" in message
    assert problem("[{name: exact}, {name: countdown, datasets: []}]").startswith("reward.terms[1].datasets=[]")


def test_a_set_without_a_term_is_an_error() -> None:
    assert problem("[{name: gsm8k, datasets: [gsm8k]}]").startswith("data.train[1].name='numbers' has no reward")
    terms = "[{name: gsm8k, datasets: [gsm8k]}, {name: countdown, datasets: [numbers]}]"
    message = problem(terms, "data.eval=[{path: held_out.jsonl}]")
    assert message.startswith("data.eval[0].name='held_out' has no reward")

"""`length`: hand-computed penalties of both kinds and in each unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import CharDelimiterSplit

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.builtin.length import length
from grpo_mega.types import UserError


@pytest.mark.parametrize(
    ("number", "penalty"), [(0, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (999, -1.0)]
)
def test_an_overlong_completion_is_penalized_linearly_over_the_buffer(number: int, penalty: float) -> None:
    assert length("", "x" * number, "", limit=100, buffer=20) == penalty


@pytest.mark.parametrize(("number", "penalty"), [(100, 0.0), (90, -0.5), (110, -0.5), (0, -1.0), (500, -1.0)])
def test_a_missed_target_is_penalized_on_both_sides(number: int, penalty: float) -> None:
    assert length("", "x" * number, "", limit=100, buffer=20, kind="target") == penalty


def test_words_are_separated_by_white_space() -> None:
    assert length("", "one  two\nthree", "", limit=4, buffer=4, unit="words") == -0.75


def test_tokens_are_those_of_the_named_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = CharDelimiterSplit("-")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        value = length("", "a b-c-\ud800", "", limit=4, buffer=4, unit="tokens", tokenizer=str(path))
        assert value == -0.75


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"limit": 10}, "missing a required argument: 'buffer'"),
        ({"limit": 10, "buffer": 11}, "buffer=11 is more than limit=10"),
        ({"limit": 0, "buffer": 1}, "limit=0 must be a whole number"),
        ({"limit": 10, "buffer": 1.5}, "buffer=1.5 must be a whole number"),
        ({"limit": 10, "buffer": 5, "kind": "cosine"}, "kind='cosine' is unknown"),
        ({"limit": 10, "buffer": 5, "unit": "bytes"}, "unit='bytes' is unknown"),
        ({"limit": 10, "buffer": 5, "unit": "tokens"}, "give both unit: tokens and tokenizer"),
        ({"limit": 10, "buffer": 5, "unit": "tokens", "tokenizer": "/nowhere"}, "tokenizer='/nowhere' cannot be read"),
    ],
)
def test_a_bad_argument_is_rejected_before_the_run(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_rewards([RewardTerm(name="length", args=args)])
    assert message in str(caught.value)

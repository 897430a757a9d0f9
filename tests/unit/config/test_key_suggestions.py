"""Unknown keys: names of other systems, keys of other sections, and misspelled paths."""

from __future__ import annotations

import pytest

from grpo_mega.config.key_suggestions import NAMES_ELSEWHERE, suggest_key
from grpo_mega.config.load import known_keys

KNOWN = known_keys()


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("optimizer.learning_rate", "optimizer.lr"),
        ("train.learning_rate", "optimizer.lr"),
        ("learning-rate", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("optimizer.weightdecay", "optimizer.weight_decay"),
        ("optimixer.lr", "optimizer.lr"),
        ("actor_rollout_ref.rollout.n", "sampling.group_size"),
        ("algorithm.beta", "algorithm.kl_coef"),
        ("train.temperature", "sampling.temperature"),
        ("evaluatoin.temperature", "evaluation.temperature"),
        ("train.group_size", "sampling.group_size"),
        ("reward.terms.0.namee", "reward.terms.name"),
        ("weight_sync.veriffy", "weight_sync.verify"),
        ("samplng", "sampling"),
        ("entirely.different", None),
    ],
)
def test_the_suggestion_is_the_key_that_was_meant(key: str, suggestion: str | None) -> None:
    assert suggest_key(key, KNOWN) == suggestion


def test_every_name_of_another_system_stands_for_a_key() -> None:
    assert sorted(set(NAMES_ELSEWHERE.values()) - set(KNOWN)) == []
    same = {key for key in KNOWN if key.rpartition(".")[2] in NAMES_ELSEWHERE}
    assert same == {"model.base.batch_size", "model.base.learning_rate"}  # of the tiny base, seldom meant

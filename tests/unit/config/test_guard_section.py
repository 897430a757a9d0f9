"""grpo_mega.config.guard_section: short and long form of a rule, defaults, and the messages of wrong values."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.config.guard_section import GuardRules
from grpo_mega.config.load import load_config, resolved
from grpo_mega.types import UserError

QUICKSTART = Path("configs/quickstart.yaml")


def rules(*overrides: str) -> GuardRules:
    return load_config(QUICKSTART, overrides).guard.rules


def test_by_default_only_a_non_finite_loss_or_gradient_has_an_action() -> None:
    assert rules().actions == {"non_finite": "stop"}


def test_an_action_alone_keeps_the_threshold_and_a_section_sets_both() -> None:
    found = rules(
        "guard.rules.non_finite=rollback",
        "guard.rules.gradient_spike=skip_update",
        "guard.rules.kl={action: stop, threshold: 2.5}",
        "guard.rules.truncation.action=warn",
        "guard.rules.truncation.threshold=0.25",
        "guard.rules.degenerate=off",  # YAML reads it as False
    )
    assert found.actions == {
        "non_finite": "rollback",
        "gradient_spike": "skip_update",
        "kl": "stop",
        "truncation": "warn",
    }
    assert (found.gradient_spike.threshold, found.kl.threshold, found.truncation.threshold) == (30.0, 2.5, 0.25)


def test_the_resolved_config_gives_the_same_rules() -> None:
    config = load_config(
        QUICKSTART, ["guard.rules.kl={action: stop, threshold: 2.5}", "guard.rules.non_finite=rollback"]
    )
    stored = resolved(config)["guard"]["rules"]
    assert stored["kl"] == {"action": "stop", "threshold": 2.5}
    assert GuardRules.model_validate(stored) == config.guard.rules


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("guard.rules.non_finite=warn", ("guard.rules.non_finite.action='warn'", "'skip_update'")),
        ("guard.rules.non_finite=off", ("guard.rules.non_finite.action",)),
        ("guard.rules.mismatch=skip_update", ("guard.rules.mismatch.action='skip_update'", "'rollback'")),
        ("guard.rules.kl=halt", ("guard.rules.kl.action='halt'", "'warn'")),
        ("guard.rules.kl={action: stop, threshold: 0}", ("guard.rules.kl.threshold=0", "greater than 0")),
        ("guard.rules.kl.threshold=5", ("threshold=5 has no effect with action=off", "set the action")),
        (
            "guard.rules.gradient_spikes=stop",
            ("guard.rules.gradient_spikes", "did you mean guard.rules.gradient_spike"),
        ),
        ("guard.max_rollbacks=-1", ("guard.max_rollbacks=-1",)),
    ],
)
def test_a_wrong_value_is_named(override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as raised:
        rules(override)
    assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.temperature=1e300", "sampling.temperature=1e+300: input should be less than or equal to 2"),
        ("evaluation.temperature=0.001", "evaluation.temperature=0.001: input should be greater than or equal to 0.01"),
        ("optimizer.lr=1e39", "optimizer.lr=1e+39: input should be less than or equal to 1000"),
        ("reward.terms=[{name: exact, weight: -1e308}]", "weight=-1e+308: input should be greater than or equal to"),
    ],
)
def test_a_number_with_which_no_update_is_finite_is_rejected(override: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(QUICKSTART, [override])
    assert words in str(raised.value)

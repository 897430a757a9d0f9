"""grpo_mega.observe.tuning: each slow part has its advice, and only a healthy run gets some."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.observe.alarms import Alarm
from grpo_mega.observe.history import History
from grpo_mega.observe.metric_table import require_known
from grpo_mega.observe.tuning import RULES, TuningRule, tuning_advice

ALARM = Alarm("slow rank", 1, None, 3.0, 1.8, "rank 1 is slow", "the clocks")


def run_of(steps: int = 20, **last: float) -> History:
    """Return a run whose second half has these values, with `/` in place of `__`."""
    history = History()
    for step in range(1, steps + 1):
        usual = {rule.metric: 0.0 if rule.limit < 1 else 1.0 for rule in RULES}
        history.add(
            step, usual | ({name.replace("__", "/"): v for name, v in last.items()} if step > steps // 2 else {})
        )
    return history


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.metric)
def test_each_slow_part_has_its_advice(rule: TuningRule) -> None:
    require_known([rule.metric])
    slow = {rule.metric.replace("/", "__"): 3 * rule.limit + 0.5}
    assert tuning_advice(run_of(), []) == []
    (advice,) = tuning_advice(run_of(40, **slow), [])
    assert advice == rule.text.format(value=3 * rule.limit + 0.5)


def test_a_run_with_an_alarm_and_a_short_run_get_no_advice() -> None:
    slow = run_of(40, train__padding_fraction=0.5)
    assert tuning_advice(slow, []) == ["50% of the trained tokens are padding; raise train.max_tokens_per_microbatch"]
    assert tuning_advice(slow, [ALARM]) == []
    assert tuning_advice(run_of(19, train__padding_fraction=0.5), []) == []


def test_a_run_with_partial_rollouts_is_not_told_to_use_them() -> None:
    assert tuning_advice(run_of(40, rollout__last_answers_fraction=0.5, rollout__carried_fraction=0.1), []) == []


def test_the_documentation_lists_every_rule() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "alarms.md").read_text(encoding="utf-8")
    assert [rule.metric for rule in RULES if f"| `{rule.metric}` |" not in text] == []

"""grpo_mega.observe.training_faults: each condition at its limit, with numbers worked by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from grpo_mega.observe.alarm_rule import Found
from grpo_mega.observe.history import History
from grpo_mega.observe.training_faults import (
    entropy_collapse,
    equal_rewards,
    far_from_reference,
    gradient_spike,
    mismatch_growth,
    reward_collapse,
    truncated_rollouts,
)


def history_of(*values: Mapping[str, float]) -> History:
    history = History()
    for step, metrics in enumerate(values, start=1):
        history.add(step, metrics)
    return history


def series(name: str, *values: float) -> History:
    return history_of(*({name: value} for value in values))


@pytest.mark.parametrize(
    ("condition", "limit", "at_limit", "beyond"),
    [
        (
            truncated_rollouts,
            0.5,
            series("rollout/truncated_fraction", 0.5),
            series("rollout/truncated_fraction", 0.51),
        ),
        (far_from_reference, 2.0, series("train/kl", 2.0), series("train/kl", 2.1)),
        # median of ten steps 2.0, factor 5
        (
            gradient_spike,
            5.0,
            series("train/grad_norm", *[2.0] * 10, 10.0),
            series("train/grad_norm", *[2.0] * 10, 10.1),
        ),
        # the mean of the first 5 is 2.0, a tenth is 0.2
        (entropy_collapse, 0.1, series("train/entropy", *[2.0] * 9, 0.2), series("train/entropy", *[2.0] * 9, 0.19)),
        # the median of the first 10 is 0.01; 4 times
        (
            mismatch_growth,
            4.0,
            series("train/mismatch_kl", *[0.01] * 10, 0.04),
            series("train/mismatch_kl", *[0.01] * 10, 0.041),
        ),
        (equal_rewards, 0.75, series("group/degenerate_fraction", 0.74), series("group/degenerate_fraction", 0.75)),
        # range 0 to 1, best mean of five 1; a half of the range below it is 0.5: (1 + 1 + .5 + 0 + 0) / 5 = 0.5
        (
            reward_collapse,
            0.5,
            series("reward/mean", *[1.0] * 17, 0.5, 0, 0),
            series("reward/mean", *[1.0] * 17, 0.4, 0, 0),
        ),
    ],
)
def test_a_condition_holds_beyond_its_limit_only(
    condition: Callable[[History, float], Found | None], limit: float, at_limit: History, beyond: History
) -> None:
    assert condition(at_limit, limit) is None
    assert condition(beyond, limit) is not None
    assert condition(history_of({}), limit) is None  # a step without the metric


def test_early_steps_have_nothing_to_compare_with() -> None:
    assert gradient_spike(series("train/grad_norm", *[1.0] * 9, 1e9)) is None
    assert entropy_collapse(series("train/entropy", *[2.0] * 8, 0.0)) is None
    assert reward_collapse(series("reward/mean", *[1.0] * 14, *[0.0] * 5)) is None


def test_a_solved_task_may_have_equal_rewards_and_a_small_entropy() -> None:
    solved = {"reward/accuracy": 0.9, "group/degenerate_fraction": 1.0, "train/entropy": 0.0}
    history = history_of(*[{"train/entropy": 2.0}] * 9, solved)
    assert equal_rewards(history) is None
    assert entropy_collapse(history) is None


def test_the_last_step_can_be_completed_and_its_values_replaced() -> None:
    history = series("train/kl", 1.0)
    history.add(2, {"train/entropy": 3.0})
    history.add(2, {"train/kl": 5.0})
    assert (history.steps, history.last("train/kl"), history.last("train/entropy")) == ([1, 2], 5.0, 3.0)
    history.add(2, {"train/kl": float("nan")})  # nothing was measured in the end
    assert history.last("train/kl") is None

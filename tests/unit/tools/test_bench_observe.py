"""tools/bench_observe.py: which steps count, and the arithmetic of the result."""

from __future__ import annotations

import pytest

from tools.bench_observe import ObservedStep, counts, is_observed, summarize


def test_blocks_of_five_steps_alternate_and_their_first_step_does_not_count() -> None:
    assert [step for step in range(1, 21) if is_observed(step)] == [6, 7, 8, 9, 10, 16, 17, 18, 19, 20]
    assert [step for step in range(1, 21) if counts(step)] == [12, 13, 14, 15, 17, 18, 19, 20]


def test_the_share_is_the_cpu_time_with_everything_on_over_that_without() -> None:
    times = [
        ObservedStep(
            step,
            is_observed(step),
            seconds=1.05 if is_observed(step) else 1.0,
            cpu_seconds=0.51 if is_observed(step) else 0.5,
            observer_seconds=0.021 if is_observed(step) else 0.0,
        )
        for step in range(1, 31)
    ]
    found = summarize(times, tensorboard_bytes=15 * 30_000)
    assert found["measured"] == pytest.approx(0.02)
    assert found["ratio"] == pytest.approx(2.0)
    assert found["wall_share"] == pytest.approx(0.05)
    assert found["direct_share"] == pytest.approx(0.02)
    assert found["tensorboard_bytes_per_1000_steps"] == pytest.approx(30e6)
    assert found["tensorboard_ratio"] == pytest.approx(0.3)


def test_longer_answers_are_not_taken_for_the_cost_of_observing() -> None:
    """A step takes 0.5 s, 1 ms per token, and 0.01 s for observing; every other pair of blocks is 0.2 s slower."""
    tokens = [
        [100.0, 300.0, 250.0, 120.0, 400.0, 170.0, 220.0][step % 7] + 50 * is_observed(step) for step in range(51)
    ]

    def seconds(step: int) -> float:
        return 0.5 + 0.001 * tokens[step] + 0.01 * is_observed(step) + 0.2 * ((step - 1) // 10 % 2)

    times = [ObservedStep(s, is_observed(s), seconds(s), seconds(s), 0.0, (tokens[s], 7.0)) for s in range(1, 51)]
    without = [seconds(step) for step in range(1, 51) if counts(step) and not is_observed(step)]
    found = summarize(times, 1)
    assert found["measured"] == pytest.approx(0.01 * len(without) / sum(without))
    assert found["standard_error"] == pytest.approx(0, abs=1e-9)
    assert found["plain_share"] != pytest.approx(found["measured"], abs=0.005)


def test_the_standard_error_is_that_of_the_fit() -> None:
    """Four steps of each kind, each 0.1 s above or below its mean: 8 deviations of 0.1, 6 degrees of freedom.

    The deviation of a step is 0.1 * sqrt(8 / 6), that of the difference of two means of four is sqrt(1/4 + 1/4) of it.
    """
    times = [
        ObservedStep(step, is_observed(step), 1.0, 1.0 + 0.1 * (-1) ** (step // 2 % 2), 0.0) for step in range(11, 21)
    ]
    found = summarize(times, 1)
    assert found["measured"] == pytest.approx(0.0)
    assert found["standard_error"] == pytest.approx(0.1 * (8 / 6) ** 0.5 * 0.5**0.5)


def test_too_few_steps_are_an_error() -> None:
    times = [ObservedStep(step, is_observed(step), 1.0, 1.0, 0.0) for step in range(1, 15)]
    with pytest.raises(ValueError, match="use at least 20"):
        summarize(times, 1)

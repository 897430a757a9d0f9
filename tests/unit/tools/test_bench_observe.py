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


def test_the_standard_error_is_that_of_the_pairs_of_blocks() -> None:
    """Two pairs with shares of 0 and 10 %: deviation 0.0707, over the root of 2."""
    seconds = {1: 1.0, 2: 1.1}
    times = [
        ObservedStep(step, is_observed(step), 1.0, seconds[(step - 1) // 10] if is_observed(step) else 1.0, 0.0)
        for step in range(11, 31)
    ]
    assert summarize(times, 1)["standard_error"] == pytest.approx(0.05)


def test_too_few_steps_are_an_error() -> None:
    times = [ObservedStep(step, is_observed(step), 1.0, 1.0, 0.0) for step in range(1, 15)]
    with pytest.raises(ValueError, match="use at least 20"):
        summarize(times, 1)

"""tools/bench_observe.py: which steps count, and the arithmetic of the result."""

from __future__ import annotations

from typing import Any

import pytest

from tools.bench_observe import ObservedStep, counts, is_observed, summarize


def test_blocks_of_five_steps_alternate_and_their_first_step_does_not_count() -> None:
    assert [step for step in range(1, 21) if is_observed(step)] == [6, 7, 8, 9, 10, 16, 17, 18, 19, 20]
    assert [step for step in range(1, 21) if counts(step)] == [12, 13, 14, 15, 17, 18, 19, 20]


def step_of(step: int, cpu: float, *, others: float = 0.0, observer: float = 0.0, size: tuple[float, ...] = ()) -> Any:
    return ObservedStep(step, is_observed(step), 2 * cpu, cpu, others, 2 * observer, observer, size)


def test_the_share_is_the_cpu_time_of_the_observer_and_of_other_threads_over_a_step_without() -> None:
    """A step takes 0.5 s of CPU time; observing 0.01 s on the main thread and 0.02 - 0.005 s on others."""
    times = [
        step_of(step, 0.525, others=0.02, observer=0.01) if is_observed(step) else step_of(step, 0.5, others=0.005)
        for step in range(1, 41)
    ]
    found = summarize(times, tensorboard_bytes=20 * 30_000)
    assert found["measured"] == pytest.approx(0.05)
    assert found["ratio"] == pytest.approx(5.0)
    assert found["whole_share"] == pytest.approx(0.05)
    assert found["wall_share"] == pytest.approx(0.05)
    assert found["direct_share"] == pytest.approx(0.01 / 0.525)
    assert found["tensorboard_bytes_per_1000_steps"] == pytest.approx(30e6)
    assert found["tensorboard_ratio"] == pytest.approx(0.3)


def test_the_last_step_has_a_checkpoint_and_does_not_count() -> None:
    times = [step_of(step, 0.5) for step in range(1, 40)] + [step_of(40, 9.0, others=5.0)]
    found = summarize(times, 1)
    assert (found["measured"], found["whole_share"]) == pytest.approx((0.0, 0.0))


def test_the_standard_error_is_that_of_two_means() -> None:
    """Other threads take 0.1 s more or less in turn: four steps of each kind, without the last one."""
    times = [step_of(step, 1.0, others=0.5 + 0.1 * (-1) ** step) for step in range(11, 22)]
    variances = [4 / 3 * 0.01 / 4, 4 / 3 * 0.01 / 4]
    assert summarize(times, 1)["standard_error"] == pytest.approx(sum(variances) ** 0.5)


def test_longer_answers_are_not_taken_for_the_cost_of_observing() -> None:
    """A step takes 0.5 s, 1 ms per token, and 0.01 s for observing; every other pair of blocks is 0.2 s slower."""
    lengths = [100.0, 300.0, 250.0, 120.0, 400.0, 170.0, 220.0]
    tokens = [lengths[step % 7] + 50 * is_observed(step) for step in range(52)]

    def seconds(step: int) -> float:
        return 0.5 + 0.001 * tokens[step] + 0.01 * is_observed(step) + 0.2 * ((step - 1) // 10 % 2)

    times = [step_of(step, seconds(step), size=(tokens[step], 7.0)) for step in range(1, 52)]
    without = [seconds(step) for step in range(1, 51) if counts(step) and not is_observed(step)]
    found = summarize(times, 1)
    assert found["whole_share"] == pytest.approx(0.01 * len(without) / sum(without))
    assert found["whole_standard_error"] == pytest.approx(0, abs=1e-9)


def test_the_standard_error_of_whole_steps_is_that_of_the_fit() -> None:
    """Four steps of each kind, each 0.1 s above or below its mean: 8 deviations of 0.1, 6 degrees of freedom.

    The deviation of a step is 0.1 * sqrt(8 / 6), that of the difference of two means of four is sqrt(1/4 + 1/4) of it.
    """
    times = [step_of(step, 1.0 + 0.1 * (-1) ** (step // 2 % 2)) for step in range(11, 22)]
    found = summarize(times, 1)
    assert found["whole_share"] == pytest.approx(0.0)
    assert found["whole_standard_error"] == pytest.approx(0.1 * (8 / 6) ** 0.5 * 0.5**0.5)


def test_too_few_steps_are_an_error() -> None:
    times = [step_of(step, 1.0) for step in range(1, 15)]
    with pytest.raises(ValueError, match="use at least 20"):
        summarize(times, 1)

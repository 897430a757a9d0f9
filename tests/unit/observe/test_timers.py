"""Seconds per phase, with a clock that is set by hand."""

from __future__ import annotations

import pytest

from grpo_mega.observe.metric_table import require_known
from grpo_mega.observe.timers import PhaseTimer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_accumulate_per_step_and_in_total() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with timer.phase("evaluation"):
        clock.now += 7
    for rollout in (1, 3):
        timer.start_step()
        for _ in range(2):
            with timer.phase("rollout"):
                clock.now += rollout
        clock.now += 0.5
        with timer.phase("train"):
            clock.now += 4
    assert timer.step_seconds() == {"rollout": 6, "train": 4, "step": 10.5}
    assert timer.total_seconds() == {"evaluation": 7, "rollout": 8, "train": 8, "total": 24}


def test_a_phase_inside_another_pauses_it() -> None:
    clock, seen = Clock(), list[str]()
    timer = PhaseTimer(on_phase=seen.append, clock=clock)
    with timer.phase("train"):
        clock.now += 1
        with timer.phase("log_probs"):
            clock.now += 2
        clock.now += 4
    assert timer.step_seconds() == {"train": 5, "log_probs": 2, "step": 7}
    assert seen == ["train", "log_probs", "train"]


def test_a_running_phase_counts_up_to_now() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with timer.phase("rollout"):
        clock.now += 1
        timer.start_step()
        clock.now += 2
        assert timer.step_seconds() == {"rollout": 2, "step": 2}
    assert timer.total_seconds() == {"rollout": 3, "total": 3}


def test_a_phase_that_fails_is_counted_and_left() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)

    def fail() -> None:
        clock.now += 2
        raise RuntimeError("engine")

    with pytest.raises(RuntimeError, match="engine"), timer.phase("rollout"):
        fail()
    clock.now += 1
    assert timer.step_seconds() == {"rollout": 2, "step": 3}


def test_step_metrics_are_known_names() -> None:
    timer = PhaseTimer()
    for name in ("rollout", "reward", "log_probs", "train", "sync", "checkpoint", "evaluation"):
        with timer.phase(name):
            pass
    require_known(timer.step_metrics())
    assert "time/step_seconds" in timer.step_metrics()


@pytest.mark.parametrize("name", ["step", "total"])
def test_the_names_of_the_sums_are_no_phases(name: str) -> None:
    with pytest.raises(ValueError, match=f"phase={name}"), PhaseTimer().phase(name):
        pass


def test_spans_are_in_order_and_a_nested_phase_splits_the_outer_one() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with timer.phase("start"):
        clock.now += 5
    timer.start_step()
    assert timer.current is None
    with timer.phase("rollout"):
        clock.now += 2
        timer.step_seconds()  # reading splits no span
        clock.now += 1
        with timer.phase("reward"):
            assert timer.current == "reward"
            clock.now += 0.5
        clock.now += 0.25
    clock.now += 1
    with timer.phase("rollout"):
        clock.now += 1
    assert timer.step_spans() == [("rollout", 0, 3), ("reward", 3, 0.5), ("rollout", 3.5, 0.25), ("rollout", 4.75, 1)]

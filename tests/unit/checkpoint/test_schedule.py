"""grpo_mega.checkpoint.schedule: steps and times at which a checkpoint is due."""

from __future__ import annotations

from grpo_mega.checkpoint.schedule import CheckpointSchedule


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_steps_minutes_and_the_last_step_make_a_checkpoint_due() -> None:
    clock = Clock()
    schedule = CheckpointSchedule(4, 30.0, last_step=10, clock=clock)
    assert [step for step in range(1, 11) if schedule.is_due(step, time_is_up=False)] == [4, 8, 10]
    clock.seconds += 1799
    assert not schedule.time_is_up()
    clock.seconds += 1
    assert schedule.time_is_up()
    assert schedule.is_due(3, time_is_up=True)
    schedule.saved()
    assert not schedule.time_is_up()
    assert str(schedule).startswith("checkpoints: every 4 steps, after 30 minutes without one, ")


def test_without_rules_only_the_last_step_is_saved() -> None:
    clock = Clock()
    schedule = CheckpointSchedule(None, None, last_step=10, clock=clock)
    clock.seconds += 1e9
    assert not schedule.time_is_up()
    assert [step for step in range(1, 11) if schedule.is_due(step, time_is_up=False)] == [10]

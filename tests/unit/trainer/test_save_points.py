"""grpo_mega.trainer.save_points: when a state is saved and where a run stops, on one rank."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from grpo_mega.checkpoint.local_copies import LocalSaves
from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.checkpoint.schedule import CheckpointSchedule
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.stop_signal import Stopped
from grpo_mega.parallel.topology import Topology
from grpo_mega.trainer import save_points
from grpo_mega.trainer.save_points import SavePoints


class Recorder:
    """Stands for the checkpoint manager, the stop requests and the clock."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.code, self.seconds = 0, 0.0
        self.staged_step = self.published_step = 0

    def stage_if_due(self, policy: Any, state: LoopState, *, is_due: bool) -> None:
        if is_due:
            self.calls.append(state.step)
            self.staged_step = state.step

    def publish(self, *, wait: bool) -> None:
        self.calls.append("wait" if wait else "publish")
        self.published_step = self.staged_step

    def wait_for_removal(self) -> None:
        self.calls.append("removed")

    def delete_all(self) -> None:
        self.calls.append("delete")
        self.published_step = self.staged_step = 0

    def training_starts(self) -> None:
        self.calls.append("training")

    def wanted(self) -> int:
        return self.code

    def __call__(self) -> float:
        return self.seconds


def points_of(
    recorder: Recorder, step: int = 0, writer: BackgroundWriter | None = None, local: LocalSaves | None = None
) -> SavePoints:
    topology, one = Topology(1), recorder
    ranks = Ranks(topology, topology.coordinates(0), torch.device("cpu"))
    schedule = CheckpointSchedule(3, 30.0, last_step=5, clock=recorder)
    points = SavePoints(ranks, one, schedule, one, PhaseTimer(), 5, writer or BackgroundWriter(), local)  # type: ignore[arg-type]
    points.start(LoopState(step=step))
    recorder.calls.clear()
    return points


def make_steps(points: SavePoints, first: int, last: int) -> None:
    for step in range(first, last + 1):
        points.stop_before_updates(None, LoopState(step=step - 1))  # type: ignore[arg-type]
        points.after_updates(None, LoopState(step=step))  # type: ignore[arg-type]
        points.end_step(step)


def test_due_steps_are_saved_and_the_last_one_is_waited_for() -> None:
    recorder = Recorder()
    make_steps(points_of(recorder), 1, 5)
    assert recorder.calls == ["publish", "publish", 3, "publish", "publish", 5, "wait", "removed"]


def test_half_an_hour_without_a_checkpoint_makes_one_due() -> None:
    recorder = Recorder()
    points = points_of(recorder)
    recorder.seconds = 1800.0
    make_steps(points, 1, 2)
    assert recorder.calls == [1, "publish", "publish"]


def test_a_request_during_the_rollouts_saves_the_step_before_and_stops() -> None:
    recorder = Recorder()
    points = points_of(recorder)
    make_steps(points, 1, 2)
    recorder.calls.clear()
    recorder.code = 143
    with pytest.raises(Stopped, match="after step 2, before the updates of step 3") as caught:
        make_steps(points, 3, 3)
    assert caught.value.code == 143
    assert recorder.calls == [2, "wait"]


@pytest.mark.parametrize("begin", [0, 2])
def test_a_state_that_is_on_disk_is_not_saved_again(begin: int) -> None:
    """The base model before the first step, and the checkpoint from which a run continues."""
    recorder = Recorder()
    points = points_of(recorder, begin)
    recorder.code = 130
    with pytest.raises(Stopped):
        make_steps(points, begin + 1, begin + 1)
    assert recorder.calls == ["wait"]


def test_a_request_during_the_updates_saves_that_step_and_stops() -> None:
    recorder = Recorder()
    points = points_of(recorder)
    points.stop_before_updates(None, LoopState(step=0))  # type: ignore[arg-type]
    recorder.code = 130
    points.after_updates(None, LoopState(step=1))  # type: ignore[arg-type]
    assert recorder.calls == [1]
    with pytest.raises(Stopped, match="after step 1") as caught:
        points.end_step(1)
    assert caught.value.code == 130
    assert recorder.calls == [1, "wait"]


def test_a_request_during_the_last_step_changes_nothing() -> None:
    recorder = Recorder()
    points = points_of(recorder)
    make_steps(points, 1, 4)
    points.stop_before_updates(None, LoopState(step=4))  # type: ignore[arg-type]
    recorder.code = 130
    points.after_updates(None, LoopState(step=5))  # type: ignore[arg-type]
    points.end_step(5)


def test_a_checkpoint_is_published_when_the_files_of_its_step_are_on_disk() -> None:
    """Step 3 is saved: its publication waits for a slow write. Other steps do not wait."""
    recorder, go = Recorder(), threading.Event()
    with BackgroundWriter() as writer:
        points = points_of(recorder, writer=writer)
        make_steps(points, 1, 1)
        writer.submit(lambda: (go.wait(60), recorder.calls.append("written")))
        make_steps(points, 2, 2)
        assert recorder.calls == ["publish", "publish"]
        threading.Timer(0.2, go.set).start()
        make_steps(points, 3, 3)
    assert recorder.calls == ["publish", "publish", 3, "written", "publish"]


def test_a_requested_stop_waits_for_the_files_of_the_step_before() -> None:
    recorder, go = Recorder(), threading.Event()
    with BackgroundWriter() as writer:
        points = points_of(recorder, writer=writer)
        make_steps(points, 1, 1)
        writer.submit(lambda: (go.wait(60), recorder.calls.append("written")))
        recorder.code = 143
        threading.Timer(0.2, go.set).start()
        with pytest.raises(Stopped):
            make_steps(points, 2, 2)
    assert recorder.calls == ["publish", "written", 1, "wait"]


def test_a_failed_write_ends_the_run_without_the_checkpoint() -> None:
    def fail() -> None:
        raise OSError("no space left on device")

    recorder, writer = Recorder(), BackgroundWriter()
    points = points_of(recorder, writer=writer)
    make_steps(points, 1, 2)
    writer.submit(fail)
    with pytest.raises(OSError, match="no space left on device"):
        make_steps(points, 3, 3)
    assert recorder.calls == ["publish", "publish", 3], "step 3 is staged and not published"


def test_a_failed_write_of_another_rank_ends_this_rank_too(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    points = points_of(recorder)
    monkeypatch.setattr(save_points, "largest_on_all", lambda values, ranks: (6,) if len(values) == 1 else values)
    points.after_updates(None, LoopState(step=3))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="rank 5 could not write the rollouts or the metrics"):
        points.end_step(3)
    assert recorder.calls == [3]


def test_local_checkpoints_are_saved_between_the_others_and_deleted_when_a_newer_one_is_complete() -> None:
    recorder, local = Recorder(), Recorder()
    points = points_of(recorder, local=LocalSaves(local, every=1))  # type: ignore[arg-type]
    assert local.calls == ["delete"]  # of steps that are made again
    local.calls.clear()
    make_steps(points, 1, 5)
    assert [call for call in recorder.calls if isinstance(call, int)] == [3, 5]
    assert local.calls == [1, "wait", 2, "wait", "wait", "delete", 4, "wait", "wait", "delete"]


def test_the_rollouts_of_a_step_are_on_disk_before_its_local_checkpoint_is_visible() -> None:
    recorder, local = Recorder(), Recorder()
    with BackgroundWriter() as writer:
        points = points_of(recorder, writer=writer, local=LocalSaves(local, every=1))  # type: ignore[arg-type]
        points.stop_before_updates(None, LoopState(step=0))  # type: ignore[arg-type]
        points.after_updates(None, LoopState(step=1))  # type: ignore[arg-type]
        writer.submit(lambda: (time.sleep(0.2), local.calls.append("rollouts")))
        points.end_step(1)
    assert local.calls[-2:] == ["rollouts", "wait"]


def test_a_rollback_deletes_local_checkpoints() -> None:
    recorder, local = Recorder(), Recorder()
    points = points_of(recorder, local=LocalSaves(local, every=1))  # type: ignore[arg-type]
    make_steps(points, 1, 1)
    points.complete_writes()
    assert local.calls[-1] == "delete"

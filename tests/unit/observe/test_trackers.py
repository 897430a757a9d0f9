"""Trackers that fail, wait or are missing do not affect a run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from grpo_mega.observe.trackers import tracker as tracker_module
from grpo_mega.observe.trackers.tracked_run import TrackedRun
from grpo_mega.observe.trackers.tracker import QueuedTracker, check_trackers
from grpo_mega.types import UserError


class RecordingTracker:
    """Notes its calls; fails at the steps of `faults`, and waits for `gate` if there is one."""

    def __init__(self, faults: tuple[int, ...] = (), gate: threading.Event | None = None) -> None:
        self.calls: list[object] = []
        self._faults, self._gate = faults, gate

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._gate is not None:
            self._gate.wait()
        if step in self._faults:
            raise ConnectionError("the network is down")
        self.calls.append((step, dict(metrics)))

    def finish(self, *, is_complete: bool) -> None:
        self.calls.append(is_complete)


@pytest.mark.parametrize("is_complete", [True, False])
def test_points_arrive_in_order_and_the_end_is_marked(is_complete: bool) -> None:
    made = RecordingTracker()
    queued = QueuedTracker("it", lambda: made)
    for step in (1, 2):
        queued.write(step, {"reward/mean": step / 2})
    if is_complete:
        queued.finish()
    queued.close()
    assert made.calls == [(1, {"reward/mean": 0.5}), (2, {"reward/mean": 1.0}), is_complete]


def test_a_tracker_that_fails_is_named_once_and_not_used_again(caplog: pytest.LogCaptureFixture) -> None:
    made = RecordingTracker(faults=(2,))
    queued = QueuedTracker("wandb", lambda: made)
    for step in (1, 2, 3):
        queued.write(step, {})
    queued.close()
    assert made.calls == [(1, {})]
    assert caplog.text.count("the tracker wandb failed") == 1
    assert "the network is down" in caplog.text


def test_a_tracker_that_cannot_be_opened_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> RecordingTracker:
        raise OSError("no server")

    queued = QueuedTracker("mlflow", fail)
    queued.write(1, {})
    queued.close()
    assert "the tracker mlflow failed and is not used any more (OSError: no server)" in caplog.text


def test_a_tracker_that_waits_forever_delays_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "_MAX_PENDING", 3)
    gate = threading.Event()
    queued = QueuedTracker("wandb", lambda: RecordingTracker(gate=gate), close_seconds=0.1)
    for step in range(10):
        queued.write(step, {})
    queued.close()
    gate.set()
    assert "was too slow for" in caplog.text
    assert "did not end within 0.1 s" in caplog.text


def test_a_missing_library_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module.importlib.util, "find_spec", lambda name: None)
    check_trackers(["tensorboard"])
    with pytest.raises(UserError, match=r"names wandb, which is not installed; pip install 'grpo_mega\[wandb\]'"):
        check_trackers(["tensorboard", "wandb"])
    with pytest.raises(UserError, match="names tensorboard twice"):
        check_trackers(["tensorboard", "tensorboard"])


def test_all_commands_of_a_run_have_one_id(tmp_path: Path) -> None:
    first = TrackedRun.of(tmp_path, {}).identity
    assert TrackedRun.of(tmp_path, {}).identity == first
    (tmp_path / "other").mkdir()
    assert TrackedRun.of(tmp_path / "other", {}).identity != first

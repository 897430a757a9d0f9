"""Phases of the device: order of calls, and no sampling with stale engine weights."""

from __future__ import annotations

from typing import Any, cast

import pytest

from grpo_mega.interfaces import Engine, LearnerState
from grpo_mega.trainer.phases import Phases


class Recorder:
    """Engine and policy in one object that records its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self, what: str) -> None:
        self.calls.append(f"wake {what}")

    def offload(self, *parts: LearnerState) -> None:
        self.calls.append(("offload", set(parts)))

    def reload(self, *parts: LearnerState) -> None:
        self.calls.append(("reload", set(parts)))

    def state_bytes(self) -> dict[str, int]:
        return {}


def recorded_phases() -> tuple[Recorder, Phases]:
    recorder = Recorder()
    return recorder, Phases(cast("Engine", recorder), recorder)


def test_each_phase_offloads_before_it_reloads() -> None:
    recorder, phases = recorded_phases()
    with phases.syncing():
        recorder.calls.append("sync")
    with phases.sampling():
        recorder.calls.append("sample")
    with phases.training():
        recorder.calls.append("train")
    assert recorder.calls == [
        ("offload", {"grads", "optimizer"}),
        ("reload", {"params"}),
        "wake weights",
        "sync",
        ("offload", {"grads", "optimizer", "params"}),
        "wake kv_cache",
        "sample",
        "sleep",
        ("reload", {"params", "grads", "optimizer"}),
        "train",
    ]


def test_a_critic_is_on_the_device_only_inside_valuing() -> None:
    policy, critic = Recorder(), Recorder()
    everything = {"params", "grads", "optimizer"}
    phases = Phases(cast("Engine", Recorder()), policy, critic)
    assert critic.calls == [("offload", everything)]
    both: list[Any] = []
    policy.calls = critic.calls = both
    with phases.training(), phases.valuing():
        both.append("value")
    assert both == [
        ("reload", everything),
        ("offload", everything),
        ("reload", everything),
        "value",
        ("offload", everything),
        ("reload", everything),
    ]


def test_sampling_before_the_first_sync_is_an_error_and_moves_nothing() -> None:
    recorder, phases = recorded_phases()
    with pytest.raises(RuntimeError, match=r"weight sync.*before sampling"), phases.sampling():
        pass
    assert recorder.calls == []


def test_sampling_after_training_without_a_sync_is_an_error() -> None:
    _, phases = recorded_phases()
    with phases.syncing():
        pass
    with phases.training():
        pass
    with pytest.raises(RuntimeError, match=r"weight sync.*before sampling"), phases.sampling():
        pass


def test_one_sync_serves_several_samplings() -> None:
    recorder, phases = recorded_phases()
    with phases.syncing():
        pass
    for _ in range(2):
        with phases.sampling():
            pass
    assert recorder.calls.count("wake kv_cache") == 2


def test_sampling_after_a_failed_sync_is_an_error() -> None:
    _, phases = recorded_phases()
    with pytest.raises(ValueError, match="lost"), phases.syncing():
        raise ValueError("lost")
    with pytest.raises(RuntimeError, match=r"weight sync.*before sampling"), phases.sampling():
        pass


def test_the_policy_is_not_offloaded_for_an_engine_on_other_devices() -> None:
    recorder = Recorder()
    phases = Phases(cast("Engine", recorder), recorder, engine_elsewhere=True)
    with phases.syncing():
        recorder.calls.append("sync")
    with phases.sampling():
        recorder.calls.append("sample")
    with phases.training():
        recorder.calls.append("train")
    assert [call for call in recorder.calls if "offload" in call] == []
    with pytest.raises(RuntimeError, match=r"weight sync.*before sampling"), phases.sampling():
        pass

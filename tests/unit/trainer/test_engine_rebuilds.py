"""Rebuilds after failures of sampling: order of the calls, the bound, and what cannot be rebuilt."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import pytest

from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.rollout.sampler import SamplingFailedError
from grpo_mega.trainer.engine_rebuilds import EngineRebuilds, RebuildableEngine, RebuildableSync
from grpo_mega.types import UserError


class Recorder:
    """Engines, connections and phases that record their calls; the n-th engine has taken n steps."""

    def __init__(self, limit: int = 2) -> None:
        self.calls: list[str] = []
        self.number, self.fails_to_close, self.fails_to_build, self.fault = 0, False, False, ""
        self.timers = PhaseTimer()
        self.engine = RebuildableEngine(self.make_engine)
        self.rebuilds = EngineRebuilds(self.engine, RebuildableSync(self.make_sync), cast("Any", self), limit,
                                       self.timers, lambda mine: mine and f"rank 0: {mine}")  # fmt: skip

    def make_engine(self) -> Any:
        if self.fails_to_build:
            raise UserError("the server is gone")
        self.number += 1
        self.calls.append(f"engine {self.number}")
        return StubEngine(self, self.number)

    def make_sync(self) -> Any:
        self.calls.append("sync")
        return object()

    def rebuild_engine(self, rebuild: Any) -> None:
        assert self.timers.current == "start"  # so its stall limit is that of a start
        self.calls.append("offload")
        rebuild()

    def reading_weights(self) -> Any:
        return nullcontext()


class StubEngine:
    def __init__(self, recorder: Recorder, steps: int) -> None:
        self.recorder, self.steps = recorder, steps

    def fault(self) -> str:
        return self.recorder.fault if self.steps == 1 else ""

    def close(self) -> None:
        self.recorder.calls.append("close")
        if self.recorder.fails_to_close:
            raise RuntimeError("it is gone")


def failing(times: int, recorder: Recorder) -> Any:
    def sample() -> str:
        recorder.calls.append("sample")
        if recorder.calls.count("sample") <= times:
            raise SamplingFailedError("sampling failed on rank 1: it broke")
        return "groups"

    return sample


@pytest.mark.parametrize("fails_to_close", [False, True])
def test_the_weights_are_sent_to_a_new_engine_before_sampling_again(fails_to_close: bool) -> None:
    recorder = Recorder()
    recorder.fails_to_close = fails_to_close
    recorder.calls.clear()
    assert recorder.rebuilds.sample(failing(1, recorder), lambda: recorder.calls.append("push")) == "groups"
    assert recorder.calls == ["sample", "offload", "close", "engine 2", "sync", "push", "sample"]
    assert recorder.engine.steps == 1 + 2  # it grows, as a sign of progress


def test_the_number_of_rebuilds_is_bounded() -> None:
    recorder = Recorder(limit=2)
    with pytest.raises(RuntimeError, match=r"it broke; the engines were rebuilt 2 times .*max_engine_rebuilds=2"):
        recorder.rebuilds.sample(failing(9, recorder), lambda: None)
    assert recorder.calls.count("sample") == 3


def test_an_engine_that_cannot_be_rebuilt_is_no_wrong_input() -> None:
    recorder = Recorder()
    recorder.fails_to_build = True
    with pytest.raises(RuntimeError, match="it broke; the engines cannot be rebuilt: the server is gone") as raised:
        recorder.rebuilds.sample(failing(1, recorder), lambda: None)
    assert not isinstance(raised.value, UserError)


def test_other_errors_are_not_repeated() -> None:
    recorder = Recorder()

    def sample() -> None:
        recorder.calls.append("sample")
        raise ValueError("the request is wrong")

    with pytest.raises(ValueError, match="the request is wrong"):
        recorder.rebuilds.sample(sample, lambda: None)
    assert recorder.calls.count("sample") == 1


def test_an_engine_that_was_lost_between_two_rollouts_is_rebuilt_before_the_weights_are_sent() -> None:
    recorder = Recorder(limit=1)
    recorder.calls.clear()
    recorder.rebuilds.replace_lost()
    assert recorder.calls == []
    recorder.fault = "SGLang's process 7 exited with code -9"
    recorder.rebuilds.replace_lost()
    assert recorder.calls == ["offload", "close", "engine 2", "sync"]
    recorder.rebuilds.replace_lost()
    assert recorder.rebuilds.count == 1
    with pytest.raises(RuntimeError, match=r"it broke; the engines were rebuilt 1 times before"):
        recorder.rebuilds.sample(failing(9, recorder), lambda: None)

"""Rebuilds after failures of sampling: order of the calls, the bound, and what cannot be rebuilt."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import pytest

from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.rollout.sampler import SamplingFailedError
from grpo_mega.trainer.engine_rebuilds import EngineRebuilds, RebuildableEngine, RebuildableSync
from grpo_mega.types import UserError, WeightMismatchError


class Recorder:
    """Engines, connections and phases that record their calls; the n-th engine has taken n steps."""

    def __init__(self, limit: int = 2) -> None:
        self.calls: list[str] = []
        self.number, self.fails_to_close, self.fails_to_build, self.fault = 0, False, False, ""
        self.timers, self.faults_of_rank_1 = PhaseTimer(), list[str]()
        self.engine = RebuildableEngine(self.make_engine)
        self.rebuilds = EngineRebuilds(self.engine, RebuildableSync(self.make_sync), cast("Any", self), limit,
                                       self.timers, self.first_fault)  # fmt: skip

    def first_fault(self, mine: str) -> str:
        """Stand for the ranks: rank 1 has its faults in `faults_of_rank_1`, one per call."""
        other = self.faults_of_rank_1.pop(0) if self.faults_of_rank_1 else ""
        return f"rank 0: {mine}" if mine else other and f"rank 1: {other}"

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


def test_a_sync_during_which_an_engine_was_lost_is_repeated_with_a_new_engine() -> None:
    recorder = Recorder(limit=1)
    recorder.calls.clear()

    def push() -> str:
        recorder.calls.append("push")
        if recorder.number == 1:
            recorder.fault = "SGLang's process 7 exited with code -9"
            raise WeightMismatchError("weight sync: the engine of rank 0 failed")
        return "report"

    assert recorder.rebuilds.repeat_if_lost(push) == "report"
    assert recorder.calls == ["push", "offload", "close", "engine 2", "sync", "push"]


def test_weights_that_differ_are_an_error_and_no_reason_for_a_new_engine() -> None:
    recorder = Recorder()
    recorder.calls.clear()

    def push() -> None:
        raise WeightMismatchError("weight sync: the digest of x differs")

    with pytest.raises(WeightMismatchError, match="the digest of x differs"):
        recorder.rebuilds.repeat_if_lost(push)
    assert recorder.calls == []


@pytest.mark.parametrize("fails_here", [True, False])
def test_a_sync_with_servers_that_failed_on_one_rank_is_repeated_on_all(fails_here: bool) -> None:
    recorder = Recorder(limit=1)
    recorder.calls.clear()
    recorder.faults_of_rank_1 = [] if fails_here else ["bucket 0 did not arrive"]

    def push() -> str:
        recorder.calls.append("push")
        if fails_here and recorder.number == 1:
            raise RuntimeError("bucket 0 did not arrive")
        return f"report {recorder.number}"

    assert recorder.rebuilds.push_to_servers(push) == "report 2"
    assert recorder.calls == ["push", "offload", "close", "engine 2", "sync", "push"]


def test_weights_that_differ_are_not_sent_again_by_a_sync_with_servers() -> None:
    recorder = Recorder()
    recorder.calls.clear()

    def push() -> None:
        raise WeightMismatchError("on every rank")

    with pytest.raises(WeightMismatchError, match="on every rank"):
        recorder.rebuilds.push_to_servers(push)
    assert recorder.calls == []

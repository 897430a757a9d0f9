"""Rebuilds after failures of sampling: order of the calls, the bound, and what cannot be rebuilt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.rollout.sampler import SamplingFailedError
from grpo_mega.trainer.engine_rebuilds import EngineRebuilds, RebuildableEngine, RebuildableSync
from grpo_mega.trainer.loop import sync_weights
from grpo_mega.types import UserError, WeightMismatchError
from tests.helpers.planner_cases import config_of


class Recorder:
    """Engines, connections and phases that record their calls; the n-th engine has taken n steps."""

    def __init__(self, limit: int = 2) -> None:
        self.calls: list[str] = []
        self.number, self.fails_to_close, self.fails_to_build, self.fault = 0, False, False, ""
        self.is_served, self.sync_errors = False, list[Exception | None]()
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
        return (ServedStub if self.is_served else StubEngine)(self, self.number)

    def make_sync(self) -> Any:
        self.calls.append("sync")
        if self.sync_errors and (error := self.sync_errors.pop(0)) is not None:
            raise error
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


class ServedStub(StubEngine):
    def generate_on_this_rank(self) -> None: ...


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


@pytest.mark.parametrize("fails_here", [True, False])
def test_a_server_that_is_lost_during_a_rebuild_is_replaced_by_the_next_one(fails_here: bool) -> None:
    recorder = Recorder(limit=3)
    recorder.is_served = True
    recorder.sync_errors = [RuntimeError("the spare server is gone") if fails_here else None]
    recorder.faults_of_rank_1 = ["the server is gone", "" if fails_here else "the spare server is gone"]
    recorder.calls.clear()
    assert recorder.rebuilds.push_to_servers(lambda: "report") == "report"
    assert [call for call in recorder.calls if call != "offload"] == [
        "close",
        "engine 2",
        "sync",
        "close",
        "engine 3",
        "sync",
    ]
    assert recorder.rebuilds.count == 2


def test_servers_that_are_lost_during_rebuilds_are_counted() -> None:
    recorder = Recorder(limit=2)
    recorder.is_served = True
    recorder.sync_errors = [RuntimeError("it is gone")] * 9
    recorder.faults_of_rank_1 = ["the server is gone"]
    with pytest.raises(
        RuntimeError, match=r"could not be connected: rank 0: it is gone; .*max_engine_rebuilds=2 allows"
    ):
        recorder.rebuilds.push_to_servers(lambda: "report")
    assert recorder.number == 3


@pytest.mark.parametrize(("is_served", "error"), [(False, RuntimeError), (True, WeightMismatchError)])
def test_other_errors_of_a_rebuild_end_the_run(is_served: bool, error: type[Exception]) -> None:
    recorder = Recorder()
    recorder.is_served, recorder.sync_errors = is_served, [error("no more memory")]
    with pytest.raises(error, match="no more memory"):
        recorder.rebuilds.sample(failing(1, recorder), lambda: None)


def test_a_server_that_is_lost_in_a_sync_is_replaced_while_background_sampling_is_paused() -> None:
    recorder = Recorder()
    recorder.is_served = True
    recorder.calls.clear()

    @contextmanager
    def pausing() -> Iterator[None]:
        recorder.calls.append("pause")
        yield
        recorder.calls.append("continue")

    def push(version: int, *, verify: bool) -> str:
        recorder.calls.append("push")
        if recorder.number == 1:
            raise RuntimeError("bucket 0 did not arrive")
        return f"version {version}, verify {verify}"

    job = SimpleNamespace(
        config=config_of(engine={"placement": "server", "urls": ["h:1"]}),
        background=SimpleNamespace(syncing=pausing),
        phases=SimpleNamespace(syncing=nullcontext),
        timers=recorder.timers,
        sync=SimpleNamespace(push=push, count=1),
        engines=recorder.rebuilds,
    )
    state = SimpleNamespace(policy_version=7)
    assert sync_weights(cast("Any", job), cast("Any", state)) == "version 7, verify True"
    assert recorder.calls == ["pause", "push", "offload", "close", "engine 2", "sync", "push", "continue"]

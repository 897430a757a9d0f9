"""Phases of the device: what is where in each of them, order of the moves, and no sampling with stale weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import pytest

from grpo_mega.interfaces import Engine, LearnerState
from grpo_mega.trainer.phases import Phases

EVERYTHING = frozenset(get_args(LearnerState))
STATE = frozenset({"params", "optimizer"})
WEIGHTS = frozenset({"params"})
NOTHING = frozenset[str]()


@dataclass
class Machine:
    """Learners and an engine that keep what is on the device, and check that moves away come before moves back."""

    calls: list[str] = field(default_factory=list)
    on_device: dict[str, set[str]] = field(default_factory=dict)

    def learner(self, name: str) -> Learner:
        self.on_device[name] = set(EVERYTHING)
        return Learner(self, name)

    def engine_on_free_device(self) -> Engine:
        assert not any(self.on_device.values()), f"the engine would measure {self.on_device} as used"
        return self.engine()

    def engine(self) -> Engine:
        self.calls.append("engine built")
        self.on_device["engine"] = {"weights", "kv_cache"}
        return cast("Engine", StubEngine(self))

    def place(self) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
        """Return what policy, critic and engine have on the device."""
        policy, critic, engine = (frozenset(self.on_device.get(name, ())) for name in ("policy", "critic", "engine"))
        return policy, critic, engine


@dataclass
class Learner:
    machine: Machine
    name: str

    def offload(self, *parts: LearnerState) -> None:
        self.machine.calls.append(f"{self.name} away")
        self.machine.on_device[self.name] -= set(parts)

    def reload(self, *parts: LearnerState) -> None:
        self.machine.calls.append(f"{self.name} back")
        self.machine.on_device[self.name] |= set(parts)

    def state_bytes(self) -> dict[str, int]:
        return {}


@dataclass
class StubEngine:
    machine: Machine

    def sleep(self) -> None:
        self.machine.calls.append("engine away")
        self.machine.on_device["engine"].clear()

    def wake(self, what: str) -> None:
        self.machine.calls.append("engine back")
        self.machine.on_device["engine"].add(what)


@dataclass
class Job:
    machine: Machine
    phases: Phases
    policy: Learner
    critic: Learner

    def enter(self, name: str) -> AbstractContextManager[Any]:
        learner = {"save policy": self.policy, "save critic": self.critic}.get(name)
        if learner is not None:
            return self.phases.checkpointing(learner)
        phase: Callable[[], AbstractContextManager[Any]] = getattr(self.phases, name)
        return phase()


def started(*, engine_elsewhere: bool = False) -> Job:
    machine = Machine()
    policy = machine.learner("policy")
    phases = Phases(policy, engine_elsewhere=engine_elsewhere)
    critic = phases.build_critic(lambda: machine.learner("critic"))
    phases.start_engine(machine.engine if engine_elsewhere else machine.engine_on_free_device)
    return Job(machine, phases, policy, critic)


PLACES = {  # policy, critic, engine
    "training": (EVERYTHING, NOTHING, NOTHING),
    "save policy": (STATE, NOTHING, NOTHING),
    "save critic": (NOTHING, STATE, NOTHING),
    "syncing": (WEIGHTS, NOTHING, {"weights"}),
    "sampling": (NOTHING, NOTHING, {"weights", "kv_cache"}),
    "reading_weights": (WEIGHTS, NOTHING, NOTHING),
}


def test_the_engine_is_built_when_everything_is_offloaded_and_then_sleeps() -> None:
    job = started()
    assert job.machine.place() == (NOTHING, NOTHING, NOTHING)
    assert job.machine.calls[-2:] == ["engine built", "engine away"]


def test_the_critic_is_built_after_the_policy_left_the_device() -> None:
    machine = Machine()
    policy = machine.learner("policy")

    def make() -> Learner:
        assert machine.place() == (NOTHING, NOTHING, NOTHING)
        return machine.learner("critic")

    Phases(policy).build_critic(make)
    assert machine.place() == (NOTHING, NOTHING, NOTHING)


def test_a_checkpoint_is_loaded_before_the_engine_is_built() -> None:
    machine = Machine()
    policy = machine.learner("policy")
    phases = Phases(policy)
    critic = phases.build_critic(lambda: machine.learner("critic"))
    with phases.checkpointing(critic):
        assert machine.place() == (NOTHING, STATE, NOTHING)
    with phases.checkpointing(policy):
        assert machine.place() == (STATE, NOTHING, NOTHING)
    phases.start_engine(machine.engine_on_free_device)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(PLACES, PLACES)))
def test_each_phase_holds_only_its_parts_after_any_other_and_frees_before_it_allocates(first: str, second: str) -> None:
    job = started()
    for name in (first, second):
        if name == "sampling":
            with job.phases.syncing():
                pass
        job.machine.calls.clear()
        with job.enter(name):
            assert job.machine.place() == PLACES[name]
            directions = [call.rpartition(" ")[2] for call in job.machine.calls]
            assert directions == sorted(directions), job.machine.calls  # "away" is before "back"


def test_a_critic_is_on_the_device_only_inside_valuing() -> None:
    job = started()
    with job.phases.training():
        with job.phases.valuing():
            assert job.machine.place() == (NOTHING, EVERYTHING, NOTHING)
        assert job.machine.place() == (EVERYTHING, NOTHING, NOTHING)


def test_sampling_before_the_first_sync_is_an_error_and_moves_nothing() -> None:
    job = started()
    before = list(job.machine.calls)
    with pytest.raises(RuntimeError, match=r"weight sync.*before sampling"), job.phases.sampling():
        pass
    assert job.machine.calls == before


@pytest.mark.parametrize("between", ["training", "save policy", "save critic", "reading_weights"])
def test_sampling_after_the_engine_slept_is_an_error_before_a_sync(between: str) -> None:
    job = started()
    with job.phases.syncing():
        pass
    with job.enter(between):
        pass
    with pytest.raises(RuntimeError, match=r"weight sync.*before sampling"), job.phases.sampling():
        pass


def test_one_sync_serves_several_samplings() -> None:
    job = started()
    with job.phases.syncing():
        pass
    for _ in range(2):
        with job.phases.sampling():
            assert job.machine.place() == PLACES["sampling"]


@pytest.mark.parametrize("synced_before", [False, True])
def test_sampling_after_a_failed_sync_is_an_error(synced_before: bool) -> None:
    job = started()
    if synced_before:
        with job.phases.syncing():
            pass
    with pytest.raises(ValueError, match="lost"), job.phases.syncing():
        raise ValueError("lost")
    with pytest.raises(RuntimeError, match=r"weight sync.*before sampling"), job.phases.sampling():
        pass


def test_after_an_error_in_a_phase_every_phase_can_still_be_entered() -> None:
    job = started()
    with pytest.raises(ValueError, match="lost"), job.phases.training(), job.phases.valuing():
        raise ValueError("lost")
    for name in ("save policy", "training", "syncing", "sampling"):
        with job.enter(name):
            assert job.machine.place() == PLACES[name]


def test_with_an_engine_elsewhere_the_policy_leaves_the_device_only_for_the_critic() -> None:
    job = started(engine_elsewhere=True)
    assert job.machine.place() == (EVERYTHING, NOTHING, NOTHING)
    job.machine.calls.clear()
    for name in ("syncing", "sampling", "training", "reading_weights", "save policy"):
        with job.enter(name):
            assert job.machine.place()[:2] == (EVERYTHING, NOTHING)
    assert "policy away" not in job.machine.calls
    with pytest.raises(RuntimeError, match=r"weight sync.*before sampling"), job.phases.sampling():
        pass
    with job.phases.training(), job.phases.valuing():
        assert job.machine.place()[:2] == (NOTHING, EVERYTHING)
    with job.enter("save critic"):
        assert job.machine.place()[:2] == (NOTHING, STATE)
    with job.phases.syncing():
        assert job.machine.place()[:2] == (EVERYTHING, NOTHING)

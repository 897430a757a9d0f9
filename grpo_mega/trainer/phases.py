"""Moves policy, critic and engine between device and host. The only caller of sleep, wake, offload and reload.

    phase                   policy params   grads   optimizer   critic                engine weights   engine KV cache
    start_engine            host            freed   host        host                  being built      being built
    sampling                host            freed   host        host                  device           device
    training                device          device  device      host                  asleep           asleep
    valuing                 host            freed   host        device                asleep           asleep
    checkpointing(policy)   device          freed   device      host                  asleep           asleep
    checkpointing(critic)   host            freed   host        device, grads freed   asleep           asleep
    syncing                 device          freed   host        host                  device           asleep
    reading_weights         device          freed   host        host                  asleep           asleep

Each phase moves away everything that it does not use before it brings back what it uses, so it can follow any other
phase. An engine on other devices (`engine_elsewhere`) shares no memory with the policy: the policy is offloaded only
for the critic.

This holds on every device. Without CUDA the memory of an offloaded part is freed or moved inside the host's memory, and
the part cannot be read (policy/phase_offload.py). An engine that slept has no weights until the next sync, so sampling
after any phase in which it sleeps is an error before that sync.
Asserted by tests/unit/trainer/test_phases.py and, in whole runs, by tests/e2e/test_phases.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, get_args

from grpo_mega.interfaces import Engine, LearnerMemory, LearnerState

_ALL: tuple[LearnerState, ...] = get_args(LearnerState)
_Critic = TypeVar("_Critic", bound=LearnerMemory)
_Engine = TypeVar("_Engine", bound=Engine)


class Phases:
    """State of the device of this rank, which engine, policy and critic use one after the other."""

    def __init__(self, policy: LearnerMemory, *, engine_elsewhere: bool = False) -> None:
        """Start with the policy on the device; an engine and a critic are built by this object.

        Args:
            policy: policy of this rank.
            engine_elsewhere: True if the engine runs on other devices.
        """
        self._policy = policy
        self._critic: LearnerMemory | None = None
        self._engine: Engine | None = None
        self._shares_device = not engine_elsewhere
        self._weights_current = self._cache_awake = False

    def build_critic(self, make: Callable[[], _Critic]) -> _Critic:
        """Offload the policy, build the critic, and offload it too."""
        self._policy.offload(*_ALL)
        critic = make()
        self._critic = critic
        critic.offload(*_ALL)
        return critic

    def start_engine(self, make: Callable[[], _Engine]) -> _Engine:
        """Offload policy and critic, build the engine, which measures the free memory of the device, and let it sleep.

        The first sync brings its weights.
        """
        self._hold()
        engine = make()
        self._engine = engine
        engine.sleep()
        return engine

    def rebuild_engine(self, rebuild: Callable[[], object]) -> None:
        """Offload policy and critic, let `rebuild` replace the engine, which has failed, and let the new one sleep."""
        self._weights_current = self._cache_awake = False
        self._hold()
        rebuild()
        self._started_engine.sleep()

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Give the device to the engine.

        Raises:
            RuntimeError: there was no weight sync since the engine slept.
        """
        if not self._weights_current:
            raise RuntimeError("engine weights are stale; a weight sync must run before sampling")
        self._hold()
        self._started_engine.wake("kv_cache")
        self._cache_awake = True
        yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Give the device to the policy, for log-probs, reference and updates."""
        self._sleep()
        self._hold(policy=_ALL)
        yield

    @contextmanager
    def valuing(self) -> Iterator[None]:
        """Give the device to the critic; allowed only inside `training`."""
        assert self._critic is not None, "there is no critic"
        self._hold(critic=_ALL)
        yield
        self._hold(policy=_ALL)

    @contextmanager
    def checkpointing(self, learner: LearnerMemory) -> Iterator[None]:
        """Give the device to parameters and optimizer of policy or critic, to save or load them."""
        self._sleep()
        saved: tuple[LearnerState, ...] = ("params", "optimizer")
        if learner is self._policy:
            self._hold(policy=saved)
        else:
            self._hold(critic=saved)
        yield

    @contextmanager
    def reading_weights(self) -> Iterator[None]:
        """Give the device to the policy's parameters, for an export and for the plan of weight syncs."""
        self._sleep()
        self._hold(policy=("params",))
        yield

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """Keep the weights of policy and engine on the device, and nothing else."""
        self._weights_current = False
        if self._cache_awake:
            self._sleep()
        self._hold(policy=("params",))
        self._started_engine.wake("weights")
        yield
        self._weights_current = True

    @property
    def _started_engine(self) -> Engine:
        assert self._engine is not None, "start_engine comes first"
        return self._engine

    def _sleep(self) -> None:
        self._weights_current = self._cache_awake = False
        if self._engine is not None:  # a checkpoint is loaded before the engine is built
            self._engine.sleep()

    def _hold(self, *, policy: tuple[LearnerState, ...] = (), critic: tuple[LearnerState, ...] = ()) -> None:
        """Move everything else of both learners to the host, then these parts to the device."""
        if not self._shares_device and not critic:
            policy = _ALL
        self._move(self._policy, policy, to_host=True)
        if self._critic is not None:
            self._move(self._critic, critic, to_host=True)
            self._move(self._critic, critic, to_host=False)
        self._move(self._policy, policy, to_host=False)

    @staticmethod
    def _move(learner: LearnerMemory, held: tuple[LearnerState, ...], *, to_host: bool) -> None:
        parts = tuple(part for part in _ALL if part not in held) if to_host else held
        if parts:
            (learner.offload if to_host else learner.reload)(*parts)

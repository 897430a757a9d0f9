"""Who holds the device when: the only caller of sleep, wake and offload.

    phase      policy params   grads   optimizer   engine weights   engine KV cache
    sampling   host            freed   host        device           device
    training   device          device  device      asleep           asleep
    syncing    device          freed   host        device           asleep

A critic, where there is one, is on the device inside `valuing` alone, with its gradients and its optimizer; the policy
is on the host then.

An engine on other devices (`engine_elsewhere`) takes nothing from the policy, which stays as it is while sampling and
syncing.

An engine that slept has no weights until the next sync, so sampling after training without a sync is an error. On a
machine without CUDA there is one memory: the policy stays where it is, the engine really releases its KV cache.
Asserted by tests/unit/trainer/test_phases.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from grpo_mega.interfaces import Engine

Part = Literal["params", "grads", "optimizer"]
_ALL: tuple[Part, ...] = ("params", "grads", "optimizer")


class MovableLearner(Protocol):
    """What the phases need of a policy and of a critic."""

    def offload(self, *parts: Part) -> None:
        """Free the device memory of these parts."""
        ...

    def reload(self, *parts: Part) -> None:
        """Bring them back."""
        ...


class Phases:
    """One engine, one policy and perhaps a critic that take turns on this rank's device."""

    def __init__(
        self,
        engine: Engine,
        policy: MovableLearner,
        critic: MovableLearner | None = None,
        *,
        engine_elsewhere: bool = False,
    ) -> None:
        """The critic leaves the device at once."""
        self._engine, self._policy, self._critic = engine, policy, critic
        self._makes_room, self._weights_current = not engine_elsewhere, False
        if critic is not None:
            critic.offload(*_ALL)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The engine owns the device."""
        if not self._weights_current:
            raise RuntimeError("sampling before a sync: the engine has not the policy's present weights")
        if self._makes_room:
            self._policy.offload(*_ALL)
        self._engine.wake("kv_cache")
        yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """The policy owns the device: log-probs, reference, updates."""
        self._engine.sleep()
        self._weights_current = False
        self._policy.reload(*_ALL)
        yield

    @contextmanager
    def valuing(self) -> Iterator[None]:
        """Inside `training`: the critic owns the device."""
        assert self._critic is not None, "there is no critic"
        self._policy.offload(*_ALL)
        self._critic.reload(*_ALL)
        yield
        self._critic.offload(*_ALL)
        self._policy.reload(*_ALL)

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """Weights of both, nothing else."""
        if self._makes_room:
            self._policy.offload("grads", "optimizer")
        self._policy.reload("params")
        self._engine.wake("weights")
        yield
        self._weights_current = True

"""Moves policy, critic and engine between device and host. The only caller of sleep, wake, offload and reload.

    phase      policy params   grads   optimizer   engine weights   engine KV cache
    sampling   host            freed   host        device           device
    training   device          device  device      asleep           asleep
    syncing    device          freed   host        device           asleep

A critic is on the device only inside `valuing`, with its gradients and its optimizer; then the policy is on the host.

An engine on other devices (`engine_elsewhere`) shares no memory with the policy, so the policy is not offloaded for
sampling and syncing.

An engine that slept has no weights until the next sync, so sampling after training without a sync is an error. On a
machine without CUDA, offload and reload of the policy do nothing; the engine still releases its KV cache.
Asserted by tests/unit/trainer/test_phases.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from grpo_mega.interfaces import Engine, LearnerMemory, LearnerState

_ALL: tuple[LearnerState, ...] = get_args(LearnerState)


class Phases:
    """State of the device of this rank, which engine, policy and critic use one after the other."""

    def __init__(
        self,
        engine: Engine,
        policy: LearnerMemory,
        critic: LearnerMemory | None = None,
        *,
        engine_elsewhere: bool = False,
    ) -> None:
        """Offload the critic.

        Args:
            engine: engine of this rank.
            policy: policy of this rank.
            critic: critic of this rank, if any.
            engine_elsewhere: True if the engine runs on other devices.
        """
        self._engine, self._policy, self._critic = engine, policy, critic
        self._shares_device, self._weights_current = not engine_elsewhere, False
        if critic is not None:
            critic.offload(*_ALL)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Give the device to the engine.

        Raises:
            RuntimeError: there was no weight sync since the last training.
        """
        if not self._weights_current:
            raise RuntimeError("engine weights are stale; a weight sync must run before sampling")
        if self._shares_device:
            self._policy.offload(*_ALL)
        self._engine.wake("kv_cache")
        yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Give the device to the policy, for log-probs, reference and updates."""
        self._engine.sleep()
        self._weights_current = False
        self._policy.reload(*_ALL)
        yield

    @contextmanager
    def valuing(self) -> Iterator[None]:
        """Give the device to the critic; allowed only inside `training`."""
        assert self._critic is not None, "there is no critic"
        self._policy.offload(*_ALL)
        self._critic.reload(*_ALL)
        yield
        self._critic.offload(*_ALL)
        self._policy.reload(*_ALL)

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """Keep the weights of policy and engine on the device, and nothing else."""
        if self._shares_device:
            self._policy.offload("grads", "optimizer")
        self._policy.reload("params")
        self._engine.wake("weights")
        yield
        self._weights_current = True

"""The simulated job, and the results of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_mega.planner.simulation.costs import EngineCost, PolicyCost
from grpo_mega.planner.simulation.lengths import AnswerLengths


@dataclass(frozen=True)
class SimulatedJob:
    """A job and its costs.

    Attributes:
        lengths: source of the lengths of answers.
        prompt_tokens: tokens of every prompt.
        prompts_per_step: groups of a step.
        group_size: rollouts of a group.
        updates_per_step: updates of a step.
        num_shards: number of engines, each with a prompt shard.
        engine: times of one engine.
        policy: times of the policy.
        policy_devices: devices of the policy.
        server_devices: devices of engine servers; 0: the engines use those of the policy.
    """

    lengths: AnswerLengths
    prompt_tokens: int
    prompts_per_step: int
    group_size: int
    updates_per_step: int
    num_shards: int
    engine: EngineCost
    policy: PolicyCost
    policy_devices: int = 1
    server_devices: int = 0

    @property
    def devices(self) -> int:
        """All devices."""
        return self.policy_devices + self.server_devices

    @property
    def quotas(self) -> list[int]:
        """Groups that each shard gives to a step."""
        return [len(range(i, self.prompts_per_step, self.num_shards)) for i in range(self.num_shards)]

    def policy_seconds(self, completions: NDArray[np.int64]) -> float:
        """Return the seconds of a step after sampling, for completions of these lengths [B] in tokens."""
        sizes = completions.astype(np.float64) + self.prompt_tokens
        return self.policy.seconds(float(sizes.sum()), float((sizes**2).sum()))


@dataclass(frozen=True)
class SampledStep:
    """The sampling of one step.

    Attributes:
        seconds: sampling time of the slowest shard.
        busy_seconds: sampling time, mean over the shards.
        decode_steps: decode steps of all shards.
        sampled_tokens: tokens that these steps sampled.
        lengths: [B] completion tokens of the trained rollouts.
        token_ages: sum of the ages of the trained tokens, in updates.
        oldest: age of the oldest trained token, in updates.
        dropped_groups: groups that were too old.
    """

    seconds: float
    busy_seconds: float
    decode_steps: int
    sampled_tokens: int
    lengths: NDArray[np.int64]
    token_ages: float = 0.0
    oldest: int = 0
    dropped_groups: int = 0


@dataclass(frozen=True)
class SimulatedMode:
    """Mean values of the simulated steps of one mode.

    Attributes:
        name: the mode and its settings.
        policy_devices: devices of the policy.
        server_devices: devices of engine servers.
        step_seconds: seconds of a step.
        updates_per_step: updates of a step.
        idle_share: fraction of the device-seconds in which a device waits for others.
        running: rollouts that an engine runs in a decode step, mean over its decode steps.
        tokens_per_step: trained tokens of a step, prompts and completions.
        staleness_mean: mean age of a trained token, in updates.
        staleness_max: age of the oldest trained token, in updates.
        dropped_groups: groups per step that became too old and were sampled again.
    """

    name: str
    policy_devices: int
    server_devices: int
    step_seconds: float
    updates_per_step: int
    idle_share: float
    running: float
    tokens_per_step: float
    staleness_mean: float = 0.0
    staleness_max: int = 0
    dropped_groups: float = 0.0

    @property
    def update_seconds(self) -> float:
        """Seconds per update."""
        return self.step_seconds / self.updates_per_step

    @property
    def tokens_per_update(self) -> float:
        """Trained tokens per update."""
        return self.tokens_per_step / self.updates_per_step

    def as_json(self) -> dict[str, Any]:
        """Return all values."""
        derived = {"update_seconds": self.update_seconds, "tokens_per_update": self.tokens_per_update}
        return {**vars(self), **derived}


def colocated_mode(job: SimulatedJob, name: str, steps: Sequence[SampledStep]) -> SimulatedMode:
    """Return the mean values of steps in which sampling and training alternate.

    If policy and engines share devices, the devices wait for the slowest engine during sampling. With servers, each
    side waits while the other side works.
    """
    policy = np.array([job.policy_seconds(step.lengths) for step in steps])
    sampling = np.array([step.seconds for step in steps])
    busy = np.array([step.busy_seconds for step in steps])
    if job.server_devices:
        idle = job.policy_devices * sampling + job.server_devices * (policy + sampling - busy)
    else:
        idle = job.policy_devices * (sampling - busy)
    seconds = sampling + policy
    num_tokens = sum(int(step.lengths.sum()) for step in steps)
    return SimulatedMode(
        name,
        job.policy_devices,
        job.server_devices,
        float(seconds.mean()),
        job.updates_per_step,
        idle_share=float(idle.sum() / (job.devices * seconds.sum())),
        running=sum(step.sampled_tokens for step in steps) / max(1, sum(step.decode_steps for step in steps)),
        tokens_per_step=float(np.mean([step.lengths.sum() + len(step.lengths) * job.prompt_tokens for step in steps])),
        staleness_mean=sum(step.token_ages for step in steps) / num_tokens,
        staleness_max=max(step.oldest for step in steps),
        dropped_groups=float(np.mean([step.dropped_groups for step in steps])),
    )

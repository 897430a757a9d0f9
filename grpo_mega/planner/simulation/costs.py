"""Times of the parts of a simulated step: prefill and decode steps of an engine, and the work of the policy.

Asserted by tests/unit/planner/simulation/test_costs.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_mega.models.flops import attention_flops
from grpo_mega.planner.engine_memory import EngineMemory
from grpo_mega.planner.inputs import PlanInputs
from grpo_mega.planner.rollout_time import decode_step, prefill_token_seconds, running_limit
from grpo_mega.planner.step_time import StepTime, token_cost


@dataclass(frozen=True)
class EngineCost:
    """Times of the engine of one prompt shard, in seconds. Element n of an array is for n running rollouts.

    Attributes:
        read: [N + 1] time in which a decode step reads the weights; N = `max_running`.
        compute: [N + 1] time of its matrix products, which overlap with the reading.
        other: [N + 1] time of the rest of the decode step.
        cached_token: time in which a decode step reads one token of the KV cache.
        prefill_token: time in which one token of a prompt is computed.
        call: time of one call of the engine, without its decode steps and prefill.
        submitted_rollout: time that each rollout adds to a call.
        recomputed_tokens: tokens of a rollout that a call computes again although the KV cache has its sequence.
    """

    read: Sequence[float]
    compute: Sequence[float]
    other: Sequence[float]
    cached_token: float
    prefill_token: float
    call: float = 0.0
    submitted_rollout: float = 0.0
    recomputed_tokens: float = 0.0

    @property
    def max_running(self) -> int:
        """Most rollouts that run at the same time."""
        return len(self.read) - 1

    def decode(self, running: int, cached: float, steps: int) -> float:
        """Return the seconds of successive decode steps with the same running rollouts.

        Step i reads `cached` + i x `running` tokens and takes max(memory_i, compute) + other. memory_i grows with i,
        so the first steps are bound by computing and the others by reading.

        Args:
            running: number of running rollouts.
            cached: tokens in the cache at the first of the steps.
            steps: number of decode steps.
        """
        first = self.read[running] + self.cached_token * cached
        growth = self.cached_token * running
        short = self.compute[running] - first
        bound = steps if short > 0 else 0
        if short > 0 and growth > 0:
            bound = min(steps, math.ceil(short / growth))
        reading = steps - bound
        return (
            bound * self.compute[running]
            + reading * first
            + growth * (steps * (steps - 1) - bound * (bound - 1)) / 2
            + steps * self.other[running]
        )

    def steps_until(self, running: int, cached: float, seconds: float, most: int) -> int:
        """Return the smallest number of decode steps that take at least `seconds`, or `most` if it is smaller.

        Args:
            running: number of running rollouts.
            cached: tokens in the cache at the first of the steps.
            seconds: time that the steps must take.
            most: decode steps up to the next event.
        """
        low, high = 0, most
        while low < high:
            middle = (low + high) // 2
            if self.decode(running, cached, middle) >= seconds:
                high = middle
            else:
                low = middle + 1
        return low

    @classmethod
    def planned(cls, inputs: PlanInputs, engine: EngineMemory, mean_tokens: float) -> EngineCost:
        """Return the times that the planner assumes (planner/rollout_time.py).

        Args:
            inputs: the run.
            engine: memory of its engine.
            mean_tokens: mean tokens of a rollout, including its prompt.
        """
        cost = token_cost(inputs.spec, mean_tokens)
        limit = int(running_limit(inputs, engine, mean_tokens))
        steps = [decode_step(inputs, engine, float(n), cost.active, cached=0.0) for n in range(limit + 1)]
        return cls(
            read=[step.memory for step in steps],
            compute=[step.compute for step in steps],
            other=[step.collectives + step.engine for step in steps],
            cached_token=engine.kv_bytes_per_token
            / (inputs.gpu.memory_bandwidth * inputs.assumptions.decode_bandwidth),
            prefill_token=prefill_token_seconds(inputs, cost.forward),
            recomputed_tokens=inputs.kv_cache.format.block_tokens / 2,
        )


@dataclass(frozen=True)
class PolicyCost:
    """Seconds of a step without sampling: fixed + per_token x T + per_square x the sum of the squared lengths.

    A length is that of a whole rollout, prompt and completion, in tokens; T is the sum of the lengths. `sync` is the
    part of `fixed` in which the engines receive the weights.
    """

    fixed: float
    per_token: float
    per_square: float = 0.0
    sync: float = 0.0

    def seconds(self, tokens: float, squares: float) -> float:
        """Return the seconds of the phases after sampling."""
        return self.fixed + self.per_token * tokens + self.per_square * squares

    @classmethod
    def planned(cls, inputs: PlanInputs, time: StepTime) -> PolicyCost:
        """Return the planner's times: log-probs and training grow with the operations, the rest is fixed.

        The operations of attention are taken as proportional to the squared lengths, as without sliding windows.
        """
        phases, work = time.phases, inputs.workload
        scaled = sum(phases.get(name, 0.0) for name in ("log_probs", "train", "value"))
        attention = attention_flops(inputs.spec, [work.mean])
        weights = 2 * token_cost(inputs.spec, work.mean).active * work.mean
        per_rollout = scaled / work.rollouts
        return cls(
            fixed=time.seconds - scaled - phases["rollout"],
            per_token=per_rollout * weights / (weights + attention) / work.mean,
            per_square=per_rollout * attention / (weights + attention) / work.mean**2,
            sync=phases["sync"],
        )

"""Simulates synchronous steps: each engine samples the groups of its prompt shard, and the step waits for all of them.

An engine runs at most `max_running` rollouts. A waiting rollout begins in the first decode step after the end of
another one. Events are starts and ends of rollouts; the time between two events has a closed form (costs.py).
Asserted by tests/unit/planner/simulation/test_synchronous.py.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from grpo_mega.planner.simulation.costs import EngineCost
from grpo_mega.planner.simulation.workload import SampledStep, SimulatedJob


def first_steps(lengths: NDArray[np.int64], max_running: int) -> NDArray[np.int64]:
    """Return the decode step in which each rollout begins; rollouts begin in the given order.

    Args:
        lengths: [R] tokens of each rollout; a rollout samples one token per decode step.
        max_running: most rollouts that run at the same time.

    Returns:
        [R] int64.
    """
    starts = np.zeros(len(lengths), dtype=np.int64)
    if len(lengths) <= max_running:
        return starts
    ends = lengths[:max_running].tolist()
    heapq.heapify(ends)
    for i, length in enumerate(lengths[max_running:].tolist(), max_running):
        starts[i] = ends[0]
        heapq.heapreplace(ends, ends[0] + length)
    return starts


def decode_seconds(
    cost: EngineCost, starts: NDArray[np.int64], lengths: NDArray[np.int64], contexts: NDArray[np.int64]
) -> float:
    """Return the seconds of all decode steps.

    Args:
        cost: of the engine.
        starts: [R] decode step in which each rollout begins.
        lengths: [R] tokens that each rollout samples.
        contexts: [R] tokens that each rollout has before the first of them, with its prompt.
    """
    ends = starts + lengths
    events = np.unique(np.concatenate([starts, ends]))
    # a rollout that began in step s with c tokens has c - s + t of them in step t
    begun = _sums_until(starts, contexts - starts, events)
    ended = _sums_until(ends, contexts - starts, events)
    running = begun[0] - ended[0]
    cached = begun[1] - ended[1] + running * events
    between = zip(running[:-1].tolist(), cached[:-1].tolist(), np.diff(events).tolist(), strict=True)
    return sum(cost.decode(n, tokens, steps) for n, tokens, steps in between)


def _sums_until(
    at: NDArray[np.int64], values: NDArray[np.int64], events: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the count and the sum of the values with `at` <= each event."""
    order = np.argsort(at, kind="stable")
    counts = np.searchsorted(at[order], events, side="right")
    return counts, np.concatenate([[0], np.cumsum(values[order])])[counts]


def simulate_synchronous(job: SimulatedJob, num_steps: int, seed: int) -> list[SampledStep]:
    """Simulate synchronous steps, each with new groups."""
    rng = np.random.default_rng(seed)
    return [_sample(job, rng) for _ in range(num_steps)]


def _sample(job: SimulatedJob, rng: np.random.Generator) -> SampledStep:
    cost, seconds, num_steps, lengths = job.engine, [], 0, []
    for quota in job.quotas:
        own = job.lengths.draw(rng, quota, job.group_size).ravel()
        starts = first_steps(own, cost.max_running)
        decoding = decode_seconds(cost, starts, own, np.full(len(own), job.prompt_tokens))
        prefill = cost.prefill_token * quota * job.prompt_tokens  # the rollouts of a group share it
        seconds.append(decoding + prefill + cost.call + cost.submitted_rollout * len(own))
        num_steps += int((starts + own).max(initial=0))
        lengths.append(own)
    trained = np.concatenate(lengths)
    return SampledStep(max(seconds), float(np.mean(seconds)), num_steps, int(trained.sum()), trained)

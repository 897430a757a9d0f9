"""Synchronous steps: hand-worked numbers, and the same seconds as a simulation that makes one decode step at a time."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_mega.planner.simulation.costs import EngineCost
from grpo_mega.planner.simulation.synchronous import decode_seconds, first_steps, simulate_synchronous
from grpo_mega.planner.simulation.workload import colocated_mode
from tests.helpers.token_simulation import cost_of, job_of, sampled_by_tokens


def test_three_rollouts_on_two_places_by_hand() -> None:
    cost = EngineCost([0, 0, 0], [0, 0, 0], [0, 1.0, 1.5], cached_token=0.1, prefill_token=0.0)
    lengths = np.array([2, 4, 3])
    starts = first_steps(lengths, cost.max_running)
    assert starts.tolist() == [0, 0, 2]  # the third begins behind the first
    # two run with 20, 22, 10 + 12 and 11 + 13 tokens in the cache, then the third with 12
    by_hand = 4 * 1.5 + 0.1 * (20 + 22 + 22 + 24) + 1.0 + 0.1 * 12
    assert decode_seconds(cost, starts, lengths, np.full(3, 10)) == pytest.approx(by_hand)


@pytest.mark.parametrize("max_running", [1, 3, 7, 50])
def test_seconds_are_those_of_a_simulation_token_by_token(max_running: int) -> None:
    cost = cost_of(max_running)
    lengths = np.random.default_rng(max_running).integers(1, 300, 30)
    found = decode_seconds(cost, first_steps(lengths, max_running), lengths, np.full(30, 6))
    assert found == pytest.approx(sampled_by_tokens(cost, lengths.tolist(), 6), rel=1e-9)


def test_a_step_waits_for_the_slowest_engine_and_the_others_are_idle() -> None:
    job = job_of(cost_of(4))
    (step,) = simulate_synchronous(job, 1, seed=3)
    rng, seconds = np.random.default_rng(3), []
    for _ in range(2):  # each engine: 3 groups of 3
        lengths = job.lengths.draw(rng, 3, 3).ravel()
        seconds.append(sampled_by_tokens(job.engine, lengths.tolist(), 6) + 3 * 6 * 0.004 + 0.7 + 9 * 0.05)
    assert step.seconds == pytest.approx(max(seconds))
    mode = colocated_mode(job, "synchronous", [step])
    trained = (step.lengths + 6).astype(float)
    policy = 2.0 + 0.05 * trained.sum() + 0.0001 * (trained**2).sum()
    assert mode.step_seconds == pytest.approx(max(seconds) + policy)
    assert mode.update_seconds == pytest.approx(mode.step_seconds / 2)
    assert mode.idle_share == pytest.approx((max(seconds) - min(seconds)) / 2 / mode.step_seconds)
    assert mode.tokens_per_step == pytest.approx(trained.sum())
    assert (mode.staleness_mean, mode.staleness_max) == (0.0, 0)


def test_with_servers_each_side_waits_for_the_other() -> None:
    job = job_of(cost_of(4), num_shards=1, policy_devices=2, server_devices=1)
    (step,) = simulate_synchronous(job, 1, seed=3)
    policy = job.policy_seconds(step.lengths)
    idle = (2 * step.seconds + policy) / 3 / (step.seconds + policy)
    assert colocated_mode(job, "synchronous", [step]).idle_share == pytest.approx(idle)

"""Asynchronous servers: hand-worked numbers, and the times of an oracle that makes one decode step at a time."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_mega.planner.simulation.asynchronous import AsynchronousRun
from grpo_mega.planner.simulation.costs import EngineCost, PolicyCost
from grpo_mega.planner.simulation.lengths import AnswerLengths
from grpo_mega.planner.simulation.workload import SimulatedJob
from tests.helpers.token_simulation import Group, asynchronous_by_tokens, cost_of, job_of


def one_rollout_job(train_seconds: float) -> object:
    cost = EngineCost([0, 0], [0, 0], [0, 1.0], cached_token=0.0, prefill_token=0.1)
    return job_of(
        cost,
        lengths=AnswerLengths("test", 10, (np.array([10]),)),
        prompts_per_step=1,
        group_size=1,
        num_shards=1,
        updates_per_step=1,
        policy=PolicyCost(train_seconds, 0.0, sync=0.5),
        policy_devices=1,
        server_devices=1,
    )


def test_the_slower_side_decides_by_hand() -> None:
    """A rollout takes 0.6 s for its prompt and 10 s for its tokens; a push pauses the server for 0.5 s."""
    slow_policy = AsynchronousRun(one_rollout_job(20.0), 1, seed=0).run(6, 3)  # type: ignore[arg-type]
    assert slow_policy.step_seconds == pytest.approx(20.0)
    assert slow_policy.staleness_mean == pytest.approx(1.0)
    slow_server = AsynchronousRun(one_rollout_job(2.0), 1, seed=0).run(40, 4)  # type: ignore[arg-type]
    # per rollout 10.6 s, one pause of 0.5 s, and the prompt and the sampled tokens again
    assert 11.1 < slow_server.step_seconds < 11.1 + 0.1 * 16
    assert slow_server.idle_share == pytest.approx((slow_server.step_seconds - 2.0) / 2 / slow_server.step_seconds)


def test_without_staleness_the_sides_alternate() -> None:
    run = AsynchronousRun(one_rollout_job(2.0), 0, seed=0).run(5, 2)  # type: ignore[arg-type]
    assert run.step_seconds == pytest.approx(10.6 + 2.0)
    assert (run.staleness_mean, run.staleness_max, run.dropped_groups) == (0.0, 0, 0.0)


@pytest.mark.parametrize(("max_staleness", "max_running"), [(0, 5), (2, 5), (2, 64), (4, 64), (4, 9), (8, 9)])
@pytest.mark.parametrize("train", [2.0, 60.0])
def test_times_and_versions_are_those_of_the_oracle(max_staleness: int, max_running: int, train: float) -> None:
    job = job_of(cost_of(max_running), policy=PolicyCost(train, 0.01, sync=0.5), server_devices=2)
    check_with_oracle(job, max_staleness)


def test_second_groups_beyond_the_quota_are_dropped_again() -> None:
    """Short answers make steps fast, so that many long ones become too old at the same time."""
    lengths = AnswerLengths("test", 200, (*[np.arange(1, 4)] * 3, np.arange(180, 200)))
    job = job_of(cost_of(64), lengths=lengths, updates_per_step=1, policy=PolicyCost(2.0, 0.0), server_devices=2)
    assert any(group.is_second for group in check_with_oracle(job, 8))


def check_with_oracle(job: SimulatedJob, max_staleness: int) -> list[Group]:
    """Compare 25 steps with the oracle; return the dropped groups."""
    run = AsynchronousRun(job, max_staleness, seed=4)
    mode = run.run(25, 0)
    ends, batches, dropped = asynchronous_by_tokens(job, max_staleness, 25, seed=4)
    assert mode.step_seconds == pytest.approx(ends[-1] / 25, rel=1e-9)
    assert [[group.lengths for group in batch] for batch in run.trained] == [
        [[answer.length for answer in group.answers] for group in batch] for batch in batches
    ]
    ages = [
        job.updates_per_step * step - version
        for step, batch in enumerate(batches)
        for group in batch
        for answer in group.answers
        for version in answer.versions
    ]
    assert mode.staleness_mean == pytest.approx(np.mean(ages))
    assert mode.staleness_max == max(ages)
    assert mode.staleness_max <= max_staleness
    assert mode.dropped_groups * 25 == pytest.approx(len(dropped))
    return dropped

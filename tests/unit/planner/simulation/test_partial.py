"""Partial rollouts: hand-worked numbers, and the groups and seconds of an oracle that samples token by token."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_mega.planner.simulation.costs import EngineCost
from grpo_mega.planner.simulation.lengths import AnswerLengths
from grpo_mega.planner.simulation.partial import PartialSettings, PartialShard, simulate_partial
from grpo_mega.planner.simulation.workload import colocated_mode
from tests.helpers.token_simulation import PartialOracle, cost_of, job_of


def test_a_long_group_is_carried_by_hand() -> None:
    """Groups of one rollout of 10 tokens; a step takes one group, two run, and a slice has 4 tokens."""
    cost = EngineCost([0] * 3, [0] * 3, [0, 1.0, 1.5], cached_token=0.0, prefill_token=0.1)
    lengths = AnswerLengths("test", 10, (np.array([10]),))
    job = job_of(cost, lengths=lengths, prompts_per_step=1, group_size=1, num_shards=1, updates_per_step=1)
    first, second = simulate_partial(job, PartialSettings(2.0, 4, 8), 2, seed=0)
    assert first.seconds == pytest.approx(10 * 1.5 + 0.1 * 2 * 6)  # both end in the third slice; one is used
    assert second.seconds == 0.0  # the other is complete
    assert second.token_ages == 10  # all its tokens are one version old
    assert (second.oldest, second.lengths.tolist()) == (1, [10])
    assert first.sampled_tokens == 20


@pytest.mark.parametrize(("oversubmit", "max_staleness"), [(1.5, 16), (2.0, 2), (3.0, 4), (5.0, 2)])
@pytest.mark.parametrize("max_running", [5, 64])
def test_groups_and_seconds_are_those_of_the_oracle(oversubmit: float, max_staleness: int, max_running: int) -> None:
    job, quota = job_of(cost_of(max_running)), 3
    shard = PartialShard(job, PartialSettings(oversubmit, 4, max_staleness), quota, np.random.default_rng(5))
    oracle, rng, dropped = PartialOracle(job, oversubmit, 4, max_staleness, quota), np.random.default_rng(5), 0
    for step in range(30):
        version = 2 * step
        found = shard.step(version)
        seconds, used = oracle.step(version, lambda n: job.lengths.draw(rng, n, job.group_size))
        dropped += found.dropped_groups
        assert found.seconds == pytest.approx(seconds, rel=1e-9)
        assert found.lengths.tolist() == [a.length for g in used for a in g.answers]
        ages = [version - v for g in used for a in g.answers for v in a.versions]
        assert (found.token_ages, found.oldest) == (sum(ages), max(ages))
        assert found.oldest <= max_staleness
    assert dropped == oracle.dropped
    assert dropped > 0 or max_staleness > 2
    # more second groups than the quota were too old at once
    assert (oracle.dropped_again > 0) == ((oversubmit, max_running) == (5.0, 64))


def test_staleness_and_drops_reach_the_result() -> None:
    job = job_of(cost_of(64))
    steps = simulate_partial(job, PartialSettings(3.0, 4, 2), 20, seed=1)
    mode = colocated_mode(job, "partial", steps)
    assert mode.dropped_groups > 0
    assert 0 < mode.staleness_mean < mode.staleness_max
    assert mode.staleness_max <= 2

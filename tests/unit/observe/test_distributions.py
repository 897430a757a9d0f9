"""Distributions of rewards, advantages, lengths and mismatch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from grpo_mega.observe.distributions import distributions
from grpo_mega.observe.metric_table import HISTOGRAMS
from grpo_mega.types import Reward
from tests.helpers.observed_rollouts import columns_of_rollouts, make_rollout


def test_values_by_hand() -> None:
    lost = replace(make_rollout(), reward=Reward(None))
    tool = replace(make_rollout(), completion=replace(make_rollout().completion, loss_mask=(True, False, True)))
    rollouts = [make_rollout(1.0), lost, tool]
    olds = [[-0.5, -0.5, 0.0], None, [-0.25, -0.125]]
    found = distributions(columns_of_rollouts(rollouts, [0.5, 0.0, float("nan")], olds))
    assert set(found) == set(HISTOGRAMS) - {"train/ratio_distribution"}  # its counts come with the updates
    np.testing.assert_array_equal(found["reward/distribution"], [1.0, 1.0])
    np.testing.assert_array_equal(found["group/advantage_distribution"], [0.5, 0.0])
    np.testing.assert_array_equal(found["rollout/length_distribution"], [3, 3, 3])
    # sampler -0.5, -0.25, -0.125; the second token of the last rollout is an environment's
    np.testing.assert_array_equal(found["train/mismatch_distribution"], [0.0, -0.25, 0.125, 0.25, 0.0])

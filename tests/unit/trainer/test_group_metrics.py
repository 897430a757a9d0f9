"""Metrics of groups, by hand."""

from __future__ import annotations

import math
import statistics
from itertools import combinations

import numpy as np
import pytest

from grpo_mega.observe.metric_table import require_known
from grpo_mega.trainer.group_metrics import advantage_metrics, group_metrics, percentiles

NAN = math.nan


def test_groups_of_four_by_hand() -> None:
    rewards = np.array([1.0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0])
    found = group_metrics(rewards, rewards == 1, 4)
    require_known(found)
    assert found["group/all_right_fraction"] == 0.25
    assert found["group/all_wrong_fraction"] == 0.25
    deviations = [0.0, 0.0, statistics.stdev([1, 0, 0, 0]), statistics.stdev([1, 1, 0, 0])]
    assert found["group/reward_std"] == pytest.approx(statistics.fmean(deviations))
    # pass@2 of 4 samples with c right ones is 1 - C(4 - c, 2) / 6: 1, 0, 1 - 3/6, 1 - 1/6
    assert found["group/pass_at_1"] == pytest.approx((1 + 0 + 0.25 + 0.5) / 4)
    assert found["group/pass_at_2"] == pytest.approx((1 + 0 + 0.5 + 5 / 6) / 4)
    assert found["group/pass_at_4"] == pytest.approx((1 + 0 + 1 + 1) / 4)
    assert "group/pass_at_8" not in found


def test_pass_at_k_is_the_mean_over_all_subsets_of_k_rollouts() -> None:
    right = np.array([1, 0, 0, 1, 0, 0, 0, 0], dtype=bool)
    found = group_metrics(right.astype(float), right, 8)
    for k in (1, 2, 4, 8):
        subsets = [any(subset) for subset in combinations(right.tolist(), k)]
        assert found[f"group/pass_at_{k}"] == pytest.approx(statistics.fmean(subsets))


def test_rollouts_without_a_reward_do_not_count() -> None:
    rewards = np.array([1.0, NAN, NAN, NAN, 0, 1, NAN, 0, NAN, NAN, NAN, NAN])
    right = np.array([1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1], dtype=bool)
    found = group_metrics(rewards, right, 4)
    assert found["group/all_right_fraction"] == pytest.approx(1 / 3)
    assert found["group/all_wrong_fraction"] == 0.0  # the last group is neither
    assert found["group/reward_std"] == pytest.approx(statistics.stdev([0, 1, 0]))
    assert found["group/pass_at_1"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["group/pass_at_2"] == pytest.approx(2 / 3)  # the first group has one reward
    assert "group/pass_at_4" not in found


def test_groups_of_one_have_no_deviation() -> None:
    found = group_metrics(np.array([1.0, 0.0]), np.array([True, False]), 1)
    assert "group/reward_std" not in found
    assert found["group/pass_at_1"] == 0.5


def test_advantages_by_hand() -> None:
    found = advantage_metrics(np.array([1.0, -3.0, 0.0, 2.0]))
    require_known(found)
    assert found == {"group/advantage_std": pytest.approx(statistics.pstdev([1, -3, 0, 2])), "group/advantage_max": 3.0}


def test_percentiles_of_the_values_that_are_known() -> None:
    values = np.array([*range(11), NAN], dtype=float)
    assert percentiles("rollout/length_", values) == {
        "rollout/length_p10": 1.0,
        "rollout/length_p50": 5.0,
        "rollout/length_p90": 9.0,
    }
    assert percentiles("reward/", np.array([NAN])) == {}

"""Token weights of the aggregation modes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from grpo_mega.algorithm.aggregate import (
    group_token_mean_weights,
    rollout_mean_weights,
    rollout_sum_weights,
    token_mean_weights,
)


def test_weights_are_the_hand_computed_ones() -> None:
    assert rollout_mean_weights([1, 2, 5, 0]).tolist() == [1 / 4, 1 / 8, 1 / 20, 0.0]
    assert token_mean_weights([1, 2, 5, 0]).tolist() == [1 / 8, 1 / 8, 1 / 8, 0.0]
    assert rollout_sum_weights([1, 2, 5, 0], constant=10).tolist() == [1 / 40, 1 / 40, 1 / 40, 0.0]
    assert group_token_mean_weights([1, 2, 5, 0], group_size=2).tolist() == [1 / 6, 1 / 6, 1 / 10, 0.0]


@pytest.mark.parametrize(
    "weights", [rollout_mean_weights, token_mean_weights, lambda n: group_token_mean_weights(n, 2)]
)
def test_a_constant_token_loss_gives_that_constant(weights: Callable[[list[int]], NDArray[np.float64]]) -> None:
    lengths = [7, 1, 30, 12, 1, 1]
    assert sum(w * n for w, n in zip(weights(lengths), lengths, strict=True)) == pytest.approx(1, rel=1e-15)


def test_an_update_without_any_token_has_only_zeros() -> None:
    for weights in (token_mean_weights([0, 0]), group_token_mean_weights([0, 0], 2), rollout_mean_weights([0, 0])):
        assert weights.tolist() == [0.0, 0.0]
    for weights in (rollout_mean_weights([]), token_mean_weights([]), rollout_sum_weights([], 8)):
        assert weights.tolist() == []


def test_invalid_counts_are_errors() -> None:
    with pytest.raises(ValueError, match="rollout 1 has -2"):
        token_mean_weights([3, -2])
    with pytest.raises(ValueError, match=r"3 rollouts .* group_size=2"):
        group_token_mean_weights([3, 2, 1], 2)
    with pytest.raises(ValueError, match=r"constant=0 must be > 0"):
        rollout_sum_weights([3], 0)

"""Token weights of the aggregation modes."""

from __future__ import annotations

import pytest

from grpo_mega.algorithm.aggregate import rollout_mean_weights


def test_weights_are_the_hand_computed_ones() -> None:
    assert rollout_mean_weights([1, 2, 5], 4) == [1 / 4, 1 / 8, 1 / 20]


def test_a_rollout_without_loss_tokens_gets_zero_and_still_counts() -> None:
    assert rollout_mean_weights([0, 3], 2) == [0.0, 1 / 6]


def test_constant_token_loss_gives_that_constant_however_the_rollouts_are_split() -> None:
    lengths = [7, 1, 30, 12]
    parts = [rollout_mean_weights(lengths[:1], 4), rollout_mean_weights(lengths[1:], 4)]
    weights = [weight for part in parts for weight in part]
    assert weights == rollout_mean_weights(lengths, 4)
    assert sum(weight * length for weight, length in zip(weights, lengths, strict=True)) == pytest.approx(1, rel=1e-15)


def test_a_count_of_this_rank_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_rollouts=1 .* 2 rollouts"):
        rollout_mean_weights([3, 4], 1)


def test_a_negative_length_is_named() -> None:
    with pytest.raises(ValueError, match="rollout 1 has -2"):
        rollout_mean_weights([3, -2], 2)

"""Differences of log-probs between policy and engine, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from grpo_mega.data.rollout_tokens import RolloutTokens
from grpo_mega.trainer import mismatch
from grpo_mega.trainer.mismatch import Differences, mismatch_metrics
from grpo_mega.types import Completion, Prompt, Reward, Rollout
from tests.helpers.token_values import token_values

UNLIKELY = math.log(1e-3)


def rollout(log_probs: list[float], mask: tuple[bool, ...] | None = None, tokens: list[int] | None = None) -> Rollout:
    ids = tokens or list(range(len(log_probs)))
    return Rollout(Prompt(7, "", (0, 5), ""), Completion(ids, log_probs, "eos", 4, "", loss_mask=mask), Reward(0.0), 0)


def differences(rollouts: list[Rollout], old: list[list[float]]) -> Differences:
    return Differences.of(RolloutTokens.of(list(enumerate(rollouts))), token_values(old))


def metrics(rollouts: list[Rollout], old: list[list[float]]) -> list[float]:
    """Return the metrics but for the number of tokens, which is checked."""
    found = mismatch_metrics(differences(rollouts, old).sums()[None])
    assert found.pop("train/mismatch_tokens") == sum(map(len, old))
    return list(found.values())


@pytest.mark.parametrize("block", [2**15, 2, 1])
def test_mismatch_by_hand(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(mismatch, "_BLOCK", block)
    rollouts = [rollout([-1.0, -2.0]), rollout([-3.0])]
    assert metrics(rollouts, [[-1.0, -2.0], [-3.0]]) == [0.0] * 4
    largest, _, _, kl = metrics(rollouts, [[-1.0 + math.log(2), -2.0], [-3.0 - math.log(4)]])
    assert largest == pytest.approx(math.log(4), rel=1e-12)
    # exp(m) - m - 1: 2 - ln 2 - 1, 0, 1/4 + ln 4 - 1
    assert kl == pytest.approx((1 - math.log(2) - 0.75 + math.log(4)) / 3, rel=1e-12)
    assert metrics(rollouts, [[-1.0 + math.log(2), -2.0], [-3.0]])[2] == pytest.approx(1 - math.log(2), rel=1e-12)


def test_tiny_differences_are_not_lost_in_rounding() -> None:
    assert metrics([rollout([-1.0])], [[-1.0 + 2**-20]])[3] == pytest.approx(2.0**-41, rel=1e-5)


def test_log_ratios_of_any_size_give_finite_metrics() -> None:
    largest, _, _, kl = metrics([rollout([-1000.0, -1.0])], [[0.0, -1001.0]])
    assert largest == 1000.0
    # exp(m) - m - 1 for m = 1000, which counts as 40, and for m = -1000
    assert kl == pytest.approx((math.expm1(40) - 40 + 999) / 2, rel=1e-12)


def test_unlikely_tokens_count_for_the_maximum_of_all_tokens_only() -> None:
    assert metrics([rollout([-1.0, -8.0])], [[-1.25, -9.0]])[:2] == [1.0, 0.25]
    assert metrics([rollout([-8.0])], [[-9.0]])[1] == 0.0


@pytest.mark.parametrize(("old", "sampled"), [(-1.0, -30.0), (-30.0, -1.0)])
def test_a_token_that_only_one_side_finds_likely_counts(old: float, sampled: float) -> None:
    assert metrics([rollout([sampled])], [[old]])[1] == 29.0


def test_the_largest_difference_has_its_rollout_and_its_loss_token() -> None:
    mask = (True, False, True)
    found = differences(
        [rollout([-1.0, UNLIKELY - 1]), rollout([-0.5, -9.0, -2.0], mask)], [[-1.25, -20.0], [-0.5, -2.75]]
    )
    assert found.sizes[found.is_likely].tolist() == [0.25, 0.0, 0.75]
    assert found.place(int(np.argmax(np.where(found.is_likely, found.sizes, 0)))) == (1, 1)
    assert [found.num_beyond(bound) for bound in (0.0, 0.25, 0.75)] == [2, 1, 0]


def test_a_log_prob_that_is_not_a_number_is_an_infinite_difference() -> None:
    found = differences([rollout([-1.0, -1.0])], [[math.nan, -3.0]])
    assert found.sizes.tolist() == [math.inf, 2.0]
    assert found.is_likely.all()


def test_rollouts_whose_log_probs_before_the_update_are_not_known_are_left_out() -> None:
    tokens = RolloutTokens.of([(3, rollout([-1.0])), (5, rollout([-2.0])), (6, rollout([-4.0]))])
    old = replace(token_values([[-2.5]]), ids=np.array([5]))
    assert Differences.of(tokens, old).sampled.tolist() == [-2.0]


def test_a_number_of_log_probs_other_than_one_per_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 old log-probs of 1 rollouts; the sampler gave 2 loss tokens"):
        differences([rollout([-1.0, -2.0])], [[-1.0]])


def test_equal_tokens_after_equal_tokens_of_a_prompt_count_once_with_their_largest_difference() -> None:
    rollouts = [
        rollout([-1.0, -1.0], tokens=[3, 4]),
        rollout([-1.0, -1.0], tokens=[3, 4]),
        rollout([-1.0, -1.0], tokens=[9, 4]),
        rollout([-1.0, -1.0], tokens=[3, 4]),  # of another prompt
        rollout([-1.0, -1.0], tokens=[4, 3]),
    ]
    found = differences(rollouts, [[-1.0, -1.5], [-1.0, -1.75], [-1.0, -1.25], [-1.0, -1.0], [-1.0, -1.0]])
    kept = found.distinct(np.array([7, 7, 7, 8, 7]))
    # the second token of the first rollout has the smaller difference; the first tokens of both differ equally
    assert kept.tolist() == [0, 3, 4, 5, 6, 7, 8, 9]


def test_only_tokens_of_the_present_weights_are_compared() -> None:
    """A difference of 3 nats at a token of older weights is a change of the policy, not of numerics."""
    carried = Completion([4, 5, 6], [-1.0, -4.0, -2.0], "eos", 4, "", policy_versions=[2, 2, 4])
    rollouts = [Rollout(Prompt(7, "", (0, 5), ""), carried, Reward(0.0), 0), rollout([-3.0])]
    tokens, old = RolloutTokens.of(list(enumerate(rollouts))), token_values([[-1.0, -1.0, -2.5], [-3.0]])
    found = Differences.of(tokens, old, policy_version=4)
    assert (found.old.tolist(), found.sampled.tolist()) == ([-2.5, -3.0], [-2.0, -3.0])
    assert found.counts.tolist() == [1, 1]
    assert found.distinct(np.array([7, 7])).tolist() == [0, 1]
    assert (found.place(0), found.place(1)) == ((0, 0), (1, 0))
    assert Differences.of(tokens, old).sums()[0] == 3.0
    assert Differences.of(tokens, old, policy_version=9).sums().tolist() == [0.0] * 5

"""Assignment of rollouts to ranks and rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.data import row_plan
from grpo_mega.data.row_plan import RolloutCost, RowShape, plan_step, split_minibatches
from grpo_mega.types import UserError


def plan_update(lengths: list[int], dp: int, *args: Any, **more: Any) -> list[list[list[int]]]:
    """Return the plan of an update as plan[rank][microbatch] = ascending rollouts."""
    plan = row_plan.plan_update(lengths, dp, *args, **more)
    found: list[list[list[int]]] = [[[] for _ in range(plan.num_rows)] for _ in range(dp)]
    for rollout, (rank, row) in enumerate(zip(plan.rank.tolist(), plan.row.tolist(), strict=True)):
        found[rank][row].append(rollout)
    return found


@pytest.mark.parametrize(
    ("keys", "shape"),
    [
        ({}, RowShape(1, 1, 1)),
        ({"tp": 4}, RowShape(1, 1, 1)),
        ({"tp": 4, "sequence_parallel": True}, RowShape(4, 1, 1)),
        ({"cp": 3}, RowShape(6, 6, 1)),
        ({"cp": 2, "tp": 2}, RowShape(4, 4, 1)),
        ({"cp": 2, "tp": 2, "sequence_parallel": True}, RowShape(8, 8, 1)),
        ({"pp": 4}, RowShape(1, 1, 1)),
        ({"pp": 4, "vpp": 2}, RowShape(1, 1, 4)),
    ],
)
def test_the_multiples_that_each_axis_requires(keys: dict[str, Any], shape: RowShape) -> None:
    assert RowShape.of(ParallelConfig(**keys)) == shape


def test_a_plan_contains_every_rollout_once_within_the_limit_with_equal_numbers_of_microbatches() -> None:
    rng = random.Random(1)
    for _ in range(300):
        dp, limit = rng.randrange(1, 6), rng.randrange(20, 60)
        lengths = [rng.randrange(1, limit + 1) for _ in range(rng.randrange(0, 40))]
        plan = plan_update(lengths, dp, limit)
        assert len(plan) == dp
        assert len({len(rank) for rank in plan}) == 1
        assert len(plan[0]) >= 1
        assert sorted(i for rank in plan for row in rank for i in row) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in row) for rank in plan for row in rank) <= limit
        assert plan == plan_update(lengths, dp, limit)
        totals = [sum(lengths[i] for row in rank for i in row) for rank in plan]
        assert max(totals) - min(totals) <= max(lengths, default=0)


def test_ranks_with_fewer_rollouts_get_empty_microbatches() -> None:
    assert plan_update([10, 4, 4], dp=2, max_tokens=10) == [[[0]], [[1, 2]]]
    assert plan_update([8, 5], dp=3, max_tokens=8) == [[[0]], [[1]], [[]]]
    assert plan_update([9, 5, 5], dp=2, max_tokens=9) == [[[0], []], [[1], [2]]]


def test_the_number_of_microbatches_is_a_multiple_and_their_rows_have_even_length() -> None:
    assert plan_update([5, 4, 3, 2], dp=1, max_tokens=14) == [[[0, 1, 2, 3]]]
    assert plan_update([5, 4, 3, 2], dp=1, max_tokens=14, microbatch_multiple=2) == [[[0, 3], [1, 2]]]
    assert plan_update([5, 4, 3], dp=1, max_tokens=5, microbatch_multiple=4) == [[[0], [1], [2], []]]


def test_rows_have_even_length_when_one_more_is_needed() -> None:
    assert plan_update([6, 2, 2, 2], dp=1, max_tokens=10) == [[[0], [1, 2, 3]]]


def test_tight_packing_is_used_when_even_rows_do_not_fit() -> None:
    # Longest to the emptiest gives 7 + 2 + 2 = 11 and 6 + 3 = 9.
    assert plan_update([7, 6, 3, 2, 2], dp=1, max_tokens=10) == [[[0, 2], [1, 3, 4]]]


def test_plan_without_rollouts_has_one_empty_microbatch_per_rank() -> None:
    assert plan_update([], dp=3, max_tokens=8) == [[[]], [[]], [[]]]


def test_rollout_longer_than_a_microbatch_names_the_key() -> None:
    with pytest.raises(UserError, match=r"train\.max_tokens_per_microbatch=8 cannot hold a rollout of 9 tokens"):
        plan_update([3, 9], dp=1, max_tokens=8)


def test_minibatches_contain_whole_groups_with_sizes_that_differ_by_at_most_one() -> None:
    assert split_minibatches(8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    for groups in range(1, 30):
        for minibatches in range(1, groups + 1):
            cut = split_minibatches(groups, minibatches)
            assert [i for part in cut for i in part] == list(range(groups))
            assert len(cut) == minibatches
            assert max(map(len, cut)) - min(map(len, cut)) <= 1


def test_more_minibatches_than_groups_names_the_key() -> None:
    with pytest.raises(UserError, match=r"train\.minibatches_per_epoch=5 is more than the 4 groups"):
        split_minibatches(4, 5)


QUADRATIC = RolloutCost(linear=1.0, quadratic=1.0)


def test_ranks_are_balanced_by_operations_by_hand() -> None:
    # tokens: 6 + 2 | 4 + 2; operations: 42, 20, 6 and 6 make 42 | 32
    assert plan_update([6, 4, 2, 2], dp=2, max_tokens=8) == [[[0, 3]], [[1, 2]]]
    assert plan_update([6, 4, 2, 2], dp=2, max_tokens=8, cost=QUADRATIC) == [[[0]], [[1, 2, 3]]]
    # operations 72, 20, 20, 20, 20; by tokens 8 | 4 + 4 and then 4 each, which needs two rows of 8 tokens on both
    plan = plan_update([8, 4, 4, 4, 4], dp=2, max_tokens=16, cost=QUADRATIC)
    assert plan == [[[0]], [[1, 2, 3, 4]]]
    assert plan_update([8, 4, 4, 4, 4], dp=2, max_tokens=16) == [[[0, 3]], [[1, 2, 4]]]


def test_tokens_are_balanced_where_the_balance_of_operations_needs_more_rows() -> None:
    # by operations 9 | 5 x 4, which are three rows of 9 tokens of both: 27 + 0.42 * 81
    # by tokens 9 + 4 | 4 x 4, which are two rows: 18 + 0.42 * 97, which is less
    lengths, cost = [9, 4, 4, 4, 4, 4], RolloutCost(linear=1.0, quadratic=0.42)
    plan = plan_update(lengths, dp=2, max_tokens=9, cost=cost)
    assert plan == [[[0], [4]], [[1, 3], [2, 5]]] == plan_update(lengths, dp=2, max_tokens=9)
    by_operations = plan_update(lengths, dp=2, max_tokens=20, cost=cost)  # one row holds all
    assert by_operations == [[[0]], [[1, 2, 3, 4, 5]]]


def test_a_plan_by_operations_contains_every_rollout_once_within_the_limit_and_is_never_slower() -> None:
    rng = random.Random(2)
    gained = 0
    for _ in range(300):
        dp, limit = rng.randrange(1, 6), rng.randrange(20, 60)
        lengths = [rng.randrange(1, limit + 1) for _ in range(rng.randrange(1, 40))]
        plan = plan_update(lengths, dp, limit, cost=QUADRATIC)
        assert sorted(i for rank in plan for row in rank for i in row) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in row) for rank in plan for row in rank) <= limit
        assert len({len(rank) for rank in plan}) == 1
        slowest, by_tokens = (_slowest(each, lengths) for each in (plan, plan_update(lengths, dp, limit)))
        assert slowest <= by_tokens
        gained += slowest < by_tokens
    assert gained > 50


def _slowest(plan: list[list[list[int]]], lengths: list[int]) -> float:
    """Return the operations of the slowest rank: all tokens of its rows, and the squares of its rollouts."""
    longest = max(sum(lengths[i] for i in row) for rank in plan for row in rank)
    return len(plan[0]) * longest + max(sum(lengths[i] ** 2 for row in rank for i in row) for rank in plan)


def one_by_one(lengths: list[int], costs: list[float], dp: int, limit: int) -> list[list[list[int]]]:
    """Return the plan that assigns one rollout after the other, in Python."""

    def spread(rollouts: Sequence[int], num_bins: int) -> list[list[int]]:
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        totals = [0.0] * num_bins
        for i in sorted(rollouts, key=lambda i: (-costs[i], i)):
            least = totals.index(min(totals))
            bins[least].append(i)
            totals[least] += costs[i]
        return bins

    def first_fit(rollouts: Sequence[int]) -> list[list[int]]:
        bins: list[list[int]] = []
        for i in sorted(rollouts, key=lambda i: (-lengths[i], i)):
            fits = [b for b in bins if sum(lengths[j] for j in b) + lengths[i] <= limit]
            if not fits:
                bins.append([])
                fits = bins[-1:]
            fits[0].append(i)
        return bins

    ranks = spread(range(len(lengths)), dp)
    needed = max(1, *(len(first_fit(rank)) for rank in ranks))
    plan = []
    for rank in ranks:
        rows = spread(rank, needed)
        if any(sum(lengths[i] for i in row) > limit for row in rows):
            rows = first_fit(rank)
        plan.append([sorted(row) for row in [*rows, *([[]] * (needed - len(rows)))]])
    return plan


def test_a_plan_is_that_of_one_assignment_after_the_other() -> None:
    rng = random.Random(3)
    for _ in range(300):
        dp, limit = rng.randrange(1, 12), rng.randrange(20, 60)
        equal = rng.random() < 0.3  # ties everywhere
        lengths = [limit // 3 if equal else rng.randrange(1, limit + 1) for _ in range(rng.randrange(0, 90))]
        assert plan_update(lengths, dp, limit) == one_by_one(lengths, [float(n) for n in lengths], dp, limit)


def test_a_step_has_rows_of_one_length_and_its_fractions_by_hand() -> None:
    lengths = np.array([5, 3, 2, 7])
    plan = plan_step(lengths, [range(2), range(2, 4)], max_tokens=8, dp=2, shape=RowShape(4, 2))
    assert plan.lengths.tolist() == [6, 4, 2, 8]
    rows = [[[row.tolist() for row in part] for part in plan.rows_of(dp_rank)] for dp_rank in range(2)]
    assert rows == [[[[0]], [[3]]], [[[1]], [[2]]]]
    assert plan.row_tokens == 8
    assert plan.trainer.tolist() == [0, 1, 1, 0]
    assert plan.minibatch.tolist() == [0, 0, 1, 1]
    assert plan.padding_fraction == pytest.approx(1 - 20 / 32)
    assert plan.imbalance == pytest.approx((6 + 8) / (5 + 5))
    squares = plan_step(lengths, [range(4)], max_tokens=20, dp=1, shape=RowShape(), cost=QUADRATIC)
    assert squares.imbalance == 1.0

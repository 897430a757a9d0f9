"""Assignment of rollouts to data-parallel ranks, to their microbatches and to rows of one length.

No process groups are used: the same input gives the same plan on every rank. Invariants (tests/unit/data/
test_row_plan.py): a plan contains every rollout once; all ranks have the same number of microbatches; no row is longer
than the limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_mega.config.fp8_rules import RECIPES
from grpo_mega.config.policy_sections import ParallelConfig, PrecisionConfig
from grpo_mega.types import UserError


def split_minibatches(num_groups: int, minibatches: int) -> list[range]:
    """Divide the groups of a step into minibatches of whole groups, in order; sizes differ by at most one.

    Raises:
        UserError: there are more minibatches than groups.
    """
    if minibatches > num_groups:
        raise UserError(
            f"train.minibatches_per_epoch={minibatches} is more than the {num_groups} groups of a step; a "
            f"minibatch contains whole groups",
            remedy=f"use at most {num_groups}, or raise data.prompts_per_step",
        )
    bounds = [i * num_groups // minibatches for i in range(minibatches + 1)]
    return [range(begin, end) for begin, end in pairwise(bounds)]


@dataclass(frozen=True)
class RowShape:
    """Multiples that a parallel layout requires.

    The row length T is a multiple of `row_multiple`. Every segment is padded at its end to a multiple of
    `segment_multiple`. The number of microbatches of a rank is a multiple of `microbatch_multiple`.
    """

    row_multiple: int = 1
    segment_multiple: int = 1
    microbatch_multiple: int = 1

    @classmethod
    def of(cls, parallel: ParallelConfig, precision: PrecisionConfig | None = None) -> RowShape:
        """Return the multiples of a layout.

        Sequence parallelism divides a row into tp parts, and context parallelism each segment into 2 cp chunks. An
        interleaved pipeline takes microbatches in groups of pp. FP8 matrix products need a multiple of tokens.
        """
        row = parallel.tp if parallel.sequence_parallel else 1
        segment = 2 * parallel.cp * row if parallel.cp > 1 else 1
        multiple = max(row, segment)
        if precision is not None and precision.fp8 is not None:
            multiple = math.lcm(multiple, RECIPES[precision.fp8.recipe].token_multiple * parallel.cp * row)
        return cls(multiple, segment, parallel.pp if parallel.vpp > 1 else 1)

    def padded(self, num_tokens: int) -> int:
        """Return the number of tokens in a row for a rollout of `num_tokens` tokens, with its padding."""
        return -(-num_tokens // self.segment_multiple) * self.segment_multiple


@dataclass(frozen=True)
class RolloutCost:
    """Floating-point operations of a forward pass over a rollout of L tokens: linear * L + quadratic * L^2.

    Only the ratio matters for a plan. Neither coefficient is negative, so a longer rollout never costs less. Those of a
    model are in planner/step_time.py; the default counts tokens.
    """

    linear: float = 1.0
    quadratic: float = 0.0

    def of(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Return the operations of rollouts of these lengths in tokens, [N]."""
        tokens = np.asarray(lengths, dtype=np.float64)
        return self.linear * tokens + self.quadratic * tokens * tokens


@dataclass(frozen=True)
class UpdatePlan:
    """Rank and row of each of the N rollouts of one update; equal on every rank.

    Attributes:
        rank: [N] data-parallel rank.
        row: [N] microbatch among those of the rank.
        num_rows: microbatches of every rank; some may be empty.
    """

    rank: NDArray[np.int32]
    row: NDArray[np.int32]
    num_rows: int


@dataclass(frozen=True)
class StepPlan:
    """The place of every rollout of a step; equal on every rank.

    Attributes:
        minibatch: [R] minibatch of each rollout; -1 for rollouts that no minibatch has.
        trainer: [R] data-parallel rank that trains it; -1 likewise.
        row: [R] microbatch among those of the rank in the minibatch; -1 likewise.
        num_rows: microbatches of every rank in each minibatch.
        dp: number of data-parallel ranks.
        row_tokens: T, the length of every row.
        lengths: [R] tokens of each rollout, with the padding of its segment.
        cost: operations of a rollout.
    """

    minibatch: NDArray[np.int32]
    trainer: NDArray[np.int32]
    row: NDArray[np.int32]
    num_rows: tuple[int, ...]
    dp: int
    row_tokens: int
    lengths: NDArray[np.int32]
    cost: RolloutCost

    def rows_of(self, dp_rank: int) -> list[list[NDArray[np.int64]]]:
        """Return `rows[minibatch][row]` of a rank: ascending rollouts, rows of the step's table."""
        own = np.flatnonzero(self.trainer == dp_rank)
        first = np.concatenate([[0], np.cumsum(self.num_rows)])
        number = first[self.minibatch[own]] + self.row[own]  # among all rows of the rank
        order = np.argsort(number, kind="stable")
        rows = np.split(own[order], np.searchsorted(number[order], np.arange(1, first[-1])))
        return [rows[begin:end] for begin, end in pairwise(first.tolist())]

    @property
    def padding_fraction(self) -> float:
        """Padding tokens divided by all tokens of all rows; the padding of segments does not count as padding."""
        rows = sum(self.num_rows) * self.dp
        return 1.0 - int(self.lengths[self.trainer >= 0].sum()) / (rows * self.row_tokens)

    @property
    def imbalance(self) -> float:
        """Operations of the busiest data-parallel rank divided by the mean over the ranks, without padding.

        The ranks wait for each other in every update, so this is the mean over the minibatches, weighted with their
        operations.
        """
        planned = np.flatnonzero(self.trainer >= 0)
        places = self.minibatch[planned] * self.dp + self.trainer[planned]
        size = len(self.num_rows) * self.dp
        totals = np.bincount(places, self.cost.of(self.lengths)[planned], size).reshape(-1, self.dp)
        return float(totals.max(axis=1).sum() / totals.mean(axis=1).sum())


def plan_step(
    lengths: NDArray[np.integer[Any]],
    minibatches: Sequence[range],
    *,
    max_tokens: int,
    dp: int,
    shape: RowShape,
    cost: RolloutCost = RolloutCost(),
) -> StepPlan:
    """Assign the rollouts of a step to ranks and rows. All rows of the step have the same length on all ranks.

    Args:
        lengths: [R] tokens of each rollout.
        minibatches: the rollouts of each update.
        max_tokens: capacity of a row, in tokens.
        dp: number of data-parallel ranks.
        shape: multiples that the layout requires of row and segment lengths.
        cost: operations of a rollout, by which ranks and rows are balanced.

    Raises:
        UserError: a rollout is longer than `max_tokens`.
    """
    multiple = shape.segment_multiple
    padded = -(-np.asarray(lengths, dtype=np.int32) // multiple) * multiple
    minibatch, trainer, row = (np.full(len(padded), -1, dtype=np.int32) for _ in range(3))
    num_rows, longest = [], 0
    for number, ids in enumerate(minibatches):
        part = slice(ids.start, ids.stop)
        plan = plan_update(padded[part], dp, max_tokens, shape.microbatch_multiple, cost)
        minibatch[part], trainer[part], row[part] = number, plan.rank, plan.row
        num_rows.append(plan.num_rows)
        longest = max(longest, _longest_row(plan, padded[part]))
    row_tokens = -(-longest // shape.row_multiple) * shape.row_multiple
    return StepPlan(minibatch, trainer, row, tuple(num_rows), dp, row_tokens, padded, cost)


def plan_update(
    lengths: Sequence[int] | NDArray[np.integer[Any]],
    dp: int,
    max_tokens: int,
    microbatch_multiple: int = 1,
    cost: RolloutCost = RolloutCost(),
) -> UpdatePlan:
    """Assign rollouts to data-parallel ranks and to their microbatches.

    Rollouts are assigned most costly first, each to the rank with the least cost (LPT), and in the same way to the
    microbatches of the rank. So ranks and rows have about the same number of operations. Every rank computes as many
    rows as the rank that needs most, with their padding: where the balance of operations needs more rows than the
    balance of tokens and thereby costs more than it gains, tokens are balanced.

    Args:
        lengths: tokens of each rollout (prompt plus completion, padded as its segment will be), [N].
        dp: number of data-parallel ranks.
        max_tokens: maximum number of tokens of one microbatch.
        microbatch_multiple: the number of microbatches is a multiple of this number.
        cost: operations of a rollout.

    Returns:
        A plan in which every rank has the same number of microbatches, at least one.

    Raises:
        UserError: one rollout is longer than `max_tokens`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.max(initial=0) > max_tokens:
        raise UserError(
            f"train.max_tokens_per_microbatch={max_tokens} cannot hold a rollout of {sizes.max()} tokens",
            remedy=f"use at least {sizes.max()} (data.max_prompt_tokens + sampling.max_tokens always suffices)",
        )
    largest_first = np.argsort(-sizes, kind="stable")
    sizes = sizes[largest_first]
    found = _plan(sizes, sizes.astype(np.float64), dp, max_tokens, microbatch_multiple)
    if cost.quadratic != 0.0:
        by_cost = _plan(sizes, cost.of(sizes), dp, max_tokens, microbatch_multiple)
        found = min(by_cost, found, key=lambda plan: _slowest_rank(plan, sizes, dp, cost))
    rank, row = np.empty_like(found.rank), np.empty_like(found.row)
    rank[largest_first], row[largest_first] = found.rank, found.row
    return UpdatePlan(rank, row, found.num_rows)


def _plan(
    lengths: NDArray[np.int64], costs: NDArray[np.float64], dp: int, max_tokens: int, microbatch_multiple: int
) -> UpdatePlan:
    """Return the plan of rollouts in descending order of length and cost."""
    ranks = _spread(costs, dp)
    places = _by_place(ranks, dp)
    tight = _first_fit(lengths, ranks, places, dp, max_tokens)
    needed = int(tight.max(initial=0)) + 1
    num_rows = -(-needed // microbatch_multiple) * microbatch_multiple
    even = _spread_each(costs, ranks, places, dp, num_rows)
    totals = np.bincount(ranks * num_rows + even, lengths, dp * num_rows).reshape(dp, num_rows)
    # Rows of even length may exceed the limit where tight packing does not.
    exceeds = np.asarray((totals > max_tokens).any(axis=1))
    return UpdatePlan(ranks, np.where(exceeds[ranks], tight, even), num_rows)


def _longest_row(plan: UpdatePlan, lengths: NDArray[np.integer[Any]]) -> int:
    """Return the tokens of the longest row."""
    return int(np.bincount(plan.rank * plan.num_rows + plan.row, lengths).max(initial=0.0))


def _slowest_rank(plan: UpdatePlan, lengths: NDArray[np.int64], dp: int, cost: RolloutCost) -> float:
    """Return the operations of the rank with the most of them: linear ones also of the padding of its rows."""
    squares = np.bincount(plan.rank, lengths.astype(np.float64) ** 2, dp).max()
    return float(cost.linear * plan.num_rows * _longest_row(plan, lengths) + cost.quadratic * squares)


def _spread(costs: NDArray[np.float64], num_bins: int) -> NDArray[np.int32]:
    """Assign rollouts in descending order of cost, each to the bin with the least cost (on a tie, the first), [N].

    As long as the next of the sorted bins has less than every bin that has just received a rollout, it is the one with
    the least cost. So a run of rollouts is assigned at once, to one sorted bin each.
    """
    bins = np.zeros(len(costs), dtype=np.int32)
    if num_bins == 1:
        return bins
    totals, begin = np.zeros(num_bins), 0
    while begin < len(costs):
        least_first = np.argsort(totals, kind="stable")[: len(costs) - begin]
        before = totals[least_first]
        after = before + costs[begin : begin + len(before)]
        is_later = before[1:] >= np.minimum.accumulate(after)[:-1]
        size = int(is_later.argmax()) + 1 if is_later.any() else len(before)
        totals[least_first[:size]] = after[:size]
        bins[begin : begin + size] = least_first[:size]
        begin += size
    return bins


def _spread_each(
    costs: NDArray[np.float64], ranks: NDArray[np.int32], places: Sequence[NDArray[np.int64]], dp: int, num_bins: int
) -> NDArray[np.int32]:
    """Assign the rollouts of each rank to its bins as `_spread` does, [N]; for all ranks at the same time."""
    totals, bins = np.zeros((dp, num_bins)), np.zeros(len(costs), dtype=np.int32)
    for rollouts in places:
        own = ranks[rollouts]
        least = totals[own].argmin(axis=1)
        totals[own, least] += costs[rollouts]
        bins[rollouts] = least
    return bins


def _first_fit(
    lengths: NDArray[np.int64], ranks: NDArray[np.int32], places: Sequence[NDArray[np.int64]], dp: int, max_tokens: int
) -> NDArray[np.int32]:
    """Assign the rollouts of each rank to bins of at most `max_tokens` by first-fit decreasing, [N]."""
    most = np.bincount(ranks, lengths, dp).max()
    # Any two bins that are used have more than `max_tokens` together.
    totals = np.zeros((dp, 2 * int(most) // max_tokens + 2), dtype=np.int64)
    bins = np.zeros(len(lengths), dtype=np.int32)
    for rollouts in places:
        own, sizes = ranks[rollouts], lengths[rollouts]
        first = (totals[own] <= (max_tokens - sizes)[:, None]).argmax(axis=1)
        totals[own, first] += sizes
        bins[rollouts] = first
    return bins


def _by_place(ranks: NDArray[np.int32], dp: int) -> list[NDArray[np.int64]]:
    """Return the first rollout of each rank that has one, then the second of each, and so on."""
    if not len(ranks):
        return []
    counts = np.bincount(ranks, minlength=dp)
    # Stable sorts of small integers take linear time.
    by_rank = np.argsort(ranks.astype(np.min_scalar_type(dp)), kind="stable")
    places = np.arange(len(ranks)) - np.repeat(np.cumsum(counts) - counts, counts)
    by_place = by_rank[np.argsort(places.astype(np.min_scalar_type(counts.max())), kind="stable")]
    return np.split(by_place, np.cumsum(np.bincount(places))[:-1])

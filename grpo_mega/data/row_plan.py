"""Assignment of rollouts to data-parallel ranks, to their microbatches and to rows of one length.

No process groups are used: the same input gives the same plan on every rank. Invariants (tests/unit/data/
test_row_plan.py): a plan contains every rollout once; all ranks have the same number of microbatches; no row is longer
than the limit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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

    Only the ratio matters for a plan. The coefficients of a model are those of planner/step_time.py; the default counts
    tokens.
    """

    linear: float = 1.0
    quadratic: float = 0.0

    def of(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the operations of rollouts of these lengths in tokens, [N]."""
        tokens = np.asarray(lengths, dtype=np.float64)
        return self.linear * tokens + self.quadratic * tokens * tokens


@dataclass(frozen=True)
class StepPlan:
    """The rollouts of every row of a step; equal on every rank.

    Attributes:
        minibatches: `minibatches[m][dp_rank][row]` are ascending rollouts, rows of the step's table.
        row_tokens: T, the length of every row.
        lengths: [R] tokens of each rollout, with the padding of its segment.
        cost: operations of a rollout.
    """

    minibatches: list[list[list[list[int]]]]
    row_tokens: int
    lengths: NDArray[np.int64]
    cost: RolloutCost

    @property
    def trainer(self) -> NDArray[np.int64]:
        """Data-parallel rank that trains each rollout, [R]; -1 for rollouts that no minibatch has."""
        found = np.full(len(self.lengths), -1, dtype=np.int64)
        for ranks in self.minibatches:
            for dp_rank, rows in enumerate(ranks):
                for row in rows:
                    found[row] = dp_rank
        return found

    @property
    def minibatch(self) -> NDArray[np.int64]:
        """Minibatch of each rollout, [R]; -1 for rollouts that no minibatch has."""
        found = np.full(len(self.lengths), -1, dtype=np.int64)
        for number, ranks in enumerate(self.minibatches):
            for rows in ranks:
                for row in rows:
                    found[row] = number
        return found

    @property
    def padding_fraction(self) -> float:
        """Padding tokens divided by all tokens of all rows; the padding of segments does not count as padding."""
        rows = [row for ranks in self.minibatches for rows in ranks for row in rows]
        return 1.0 - sum(int(self.lengths[row].sum()) for row in rows) / (len(rows) * self.row_tokens)

    @property
    def imbalance(self) -> float:
        """Operations of the busiest data-parallel rank divided by the mean over the ranks, without padding.

        The ranks wait for each other in every update, so this is the mean over the minibatches, weighted with their
        operations.
        """
        costs = self.cost.of(self.lengths)
        totals = np.array(
            [[sum(costs[row].sum() for row in rows) for rows in ranks] for ranks in self.minibatches], dtype=np.float64
        )
        return float(totals.max(axis=1).sum() / totals.mean(axis=1).sum())


def plan_step(
    lengths: NDArray[np.int64],
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
    padded = -(-np.asarray(lengths, dtype=np.int64) // multiple) * multiple
    plans = [
        [
            [[ids[i] for i in row] for row in rank]
            for rank in plan_update(
                padded[ids.start : ids.stop].tolist(), dp, max_tokens, shape.microbatch_multiple, cost
            )
        ]
        for ids in minibatches
    ]
    longest = max(int(padded[row].sum()) for ranks in plans for rows in ranks for row in rows)
    return StepPlan(plans, -(-longest // shape.row_multiple) * shape.row_multiple, padded, cost)


def plan_update(
    lengths: Sequence[int],
    dp: int,
    max_tokens: int,
    microbatch_multiple: int = 1,
    cost: RolloutCost = RolloutCost(),
) -> list[list[list[int]]]:
    """Assign rollouts to data-parallel ranks and to their microbatches.

    Rollouts are assigned most costly first, each to the rank with the least cost (LPT), and in the same way to the
    microbatches of the rank. So ranks and rows have about the same number of operations. Every rank computes as many
    rows as the rank that needs most, with their padding: where the balance of operations needs more rows than the
    balance of tokens and thereby costs more than it gains, tokens are balanced.

    Args:
        lengths: tokens of each rollout (prompt plus completion, padded as its segment will be).
        dp: number of data-parallel ranks.
        max_tokens: maximum number of tokens of one microbatch.
        microbatch_multiple: the number of microbatches is a multiple of this number.
        cost: operations of a rollout.

    Returns:
        plan[rank][microbatch] = ascending indices into `lengths`. Every rank has the same number of microbatches, at
        least one; some may be empty.

    Raises:
        UserError: one rollout is longer than `max_tokens`.
    """
    if lengths and max(lengths) > max_tokens:
        raise UserError(
            f"train.max_tokens_per_microbatch={max_tokens} cannot hold a rollout of {max(lengths)} tokens",
            remedy=f"use at least {max(lengths)} (data.max_prompt_tokens + sampling.max_tokens always suffices)",
        )
    by_tokens = _plan(lengths, [float(n) for n in lengths], dp, max_tokens, microbatch_multiple)
    if cost.quadratic == 0.0:
        return by_tokens
    costs = cost.of(np.asarray(lengths, dtype=np.int64))
    by_cost = _plan(lengths, costs.tolist(), dp, max_tokens, microbatch_multiple)
    return min(by_cost, by_tokens, key=lambda plan: _slowest_rank(plan, lengths, cost))


def _plan(
    lengths: Sequence[int], costs: Sequence[float], dp: int, max_tokens: int, microbatch_multiple: int
) -> list[list[list[int]]]:
    ranks = _spread(range(len(lengths)), costs, dp)
    needed = max(1, *(len(_first_fit(rank, lengths, max_tokens)) for rank in ranks))
    num_microbatches = -(-needed // microbatch_multiple) * microbatch_multiple
    plan = []
    for rank in ranks:
        bins = _spread(rank, costs, num_microbatches)
        if any(_total(rollouts, lengths) > max_tokens for rollouts in bins):
            # Rows of even length may exceed the limit where tight packing does not.
            bins = _first_fit(rank, lengths, max_tokens)
            bins += [[] for _ in range(num_microbatches - len(bins))]
        plan.append([sorted(rollouts) for rollouts in bins])
    return plan


def _slowest_rank(plan: list[list[list[int]]], lengths: Sequence[int], cost: RolloutCost) -> float:
    """Return the operations of the rank with the most of them: linear ones also of the padding of its rows."""
    longest = max(_total(row, lengths) for rank in plan for row in rank)
    squares = max(sum(float(lengths[i]) ** 2 for row in rank for i in row) for rank in plan)
    return cost.linear * len(plan[0]) * longest + cost.quadratic * squares


def _total(rollouts: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in rollouts)


def _largest_first(rollouts: Sequence[int], sizes: Sequence[float]) -> list[int]:
    return sorted(rollouts, key=lambda i: (-sizes[i], i))


def _spread(rollouts: Sequence[int], costs: Sequence[float], num_bins: int) -> list[list[int]]:
    """Assign rollouts most costly first, each to the bin with the least cost (on a tie, the first such bin)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [(0.0, i) for i in range(num_bins)]  # sorted, so it is a heap
    for i in _largest_first(rollouts, costs):
        total, least = totals[0]
        bins[least].append(i)
        heapq.heapreplace(totals, (total + costs[i], least))
    return bins


def _first_fit(rollouts: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the bins of at most `max_tokens` tokens that first-fit decreasing finds."""
    bins: list[list[int]] = []
    totals: list[int] = []
    for i in _largest_first(rollouts, lengths):
        fits = next((b for b, total in enumerate(totals) if total + lengths[i] <= max_tokens), None)
        if fits is None:
            bins.append([])
            totals.append(0)
            fits = len(bins) - 1
        bins[fits].append(i)
        totals[fits] += lengths[i]
    return bins

"""Assignment of rollouts to ranks and microbatches, and packing of several rollouts into a row of T tokens.

No process groups are used: the same input gives the same plan on every rank. Invariants (tests/unit/data/test_pack.py):
a plan contains every rollout once; all ranks have the same number of microbatches; no row is longer than the limit.
Labels are shifted inside each rollout, so no token predicts a token of the next rollout. The loss mask is built from
lengths and from the source of each token (policy or environment), never from the padding token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from grpo_mega.config.fp8_rules import RECIPES
from grpo_mega.config.policy_sections import ParallelConfig, PrecisionConfig
from grpo_mega.data.expert_records import widen_record
from grpo_mega.types import Microbatch, Rollout, UserError


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


def plan_update(
    lengths: Sequence[int], dp: int, max_tokens: int, microbatch_multiple: int = 1
) -> list[list[list[int]]]:
    """Assign rollouts to data-parallel ranks and to their microbatches.

    Rollouts are assigned longest first, each to the rank with the fewest tokens (LPT), and in the same way to the
    microbatches of the rank. So rows have about the same length.

    Args:
        lengths: tokens of each rollout (prompt plus completion, padded as its segment will be).
        dp: number of data-parallel ranks.
        max_tokens: maximum number of tokens of one microbatch.
        microbatch_multiple: the number of microbatches is a multiple of this number.

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
    ranks = _spread(range(len(lengths)), lengths, dp)
    needed = max(1, *(len(_first_fit(rank, lengths, max_tokens)) for rank in ranks))
    num_microbatches = -(-needed // microbatch_multiple) * microbatch_multiple
    plan = []
    for rank in ranks:
        bins = _spread(rank, lengths, num_microbatches)
        if any(_total(rollouts, lengths) > max_tokens for rollouts in bins):
            # Rows of even length may exceed the limit where tight packing does not.
            bins = _first_fit(rank, lengths, max_tokens)
            bins += [[] for _ in range(num_microbatches - len(bins))]
        plan.append([sorted(rollouts) for rollouts in bins])
    return plan


def pack(
    rollouts: Sequence[tuple[int, Rollout]],
    *,
    row_tokens: int,
    advantages: Sequence[float | list[float]],
    token_weights: Sequence[float],
    pad_id: int,
    segment_multiple: int = 1,
) -> Microbatch:
    """Concatenate rollouts in a row, one segment per rollout; the rest of the row is a padding segment.

    Args:
        rollouts: (position in the step's list, rollout); empty gives a row without a loss token.
        row_tokens: T, the length of the row.
        advantages: one entry per rollout for its loss tokens (the completion's tokens that the policy sampled): one
            number for all of them, or a list with one number per token.
        token_weights: one number per rollout, for each of its loss tokens.
        pad_id: token id of the padding.
        segment_multiple: every segment is padded to a multiple of it. Attention is causal, so no token attends to the
            padding after it.

    Raises:
        ValueError: the rollouts have more than `row_tokens` tokens, or the lengths of a completion's tokens, mask and
            sampler log-probs differ.
    """
    shape = RowShape(segment_multiple=segment_multiple)
    total = sum(shape.padded(rollout.num_tokens) for _, rollout in rollouts)
    if total > row_tokens:
        raise ValueError(f"{len(rollouts)} rollouts of {total} tokens in all do not fit a row of {row_tokens}")
    token_ids, labels = (torch.full((row_tokens,), pad_id, dtype=torch.int64) for _ in range(2))
    loss_mask, token_mask = (torch.zeros(row_tokens, dtype=torch.bool) for _ in range(2))
    position_ids = torch.zeros(row_tokens, dtype=torch.int64)
    row_advantages, row_weights, sampler_log_probs = (torch.zeros(row_tokens) for _ in range(3))
    bounds = [0]
    for (_, rollout), advantage, weight in zip(rollouts, advantages, token_weights, strict=True):
        tokens = torch.tensor([*rollout.prompt.token_ids, *rollout.completion.token_ids], dtype=torch.int64)
        begin, end = bounds[-1], bounds[-1] + len(tokens)
        padded_end = begin + shape.padded(len(tokens))
        token_ids[begin:end], token_mask[begin:end] = tokens, True
        position_ids[begin:padded_end] = torch.arange(padded_end - begin)
        labels[begin : end - 1] = tokens[1:]
        _check(rollout)
        # Position t predicts token t + 1, so the first completion token belongs to the last prompt position.
        predicting = torch.arange(begin + len(rollout.prompt.token_ids) - 1, end - 1)
        if rollout.completion.loss_mask is not None:
            predicting = predicting[torch.tensor(rollout.completion.loss_mask)]
        loss_mask[predicting] = True
        row_advantages[predicting] = torch.tensor(advantage, dtype=torch.float32)
        row_weights[predicting] = weight
        sampler_log_probs[predicting] = torch.tensor(rollout.completion.loss_log_probs, dtype=torch.float32)
        bounds.append(padded_end)
    if total < row_tokens:
        position_ids[total:] = torch.arange(row_tokens - total)
        bounds.append(row_tokens)
    return Microbatch(
        rollout_ids=tuple(rollout_id for rollout_id, _ in rollouts),
        token_ids=token_ids,
        position_ids=position_ids,
        labels=labels,
        loss_mask=loss_mask,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        advantages=row_advantages,
        token_weights=row_weights,
        sampler_log_probs=sampler_log_probs,
        expert_choices=_expert_choices([rollout for _, rollout in rollouts], bounds, row_tokens),
        token_mask=token_mask,
    )


def unpack(values: Tensor, microbatch: Microbatch) -> dict[int, list[float]]:
    """Split values [T] of a row into the values of each rollout's loss tokens, by position in the step's list."""
    bounds = microbatch.cu_seqlens.tolist()
    completions: dict[int, list[float]] = {}
    # There are fewer rollouts than segments when the last segment is padding.
    for rollout_id, begin, end in zip(microbatch.rollout_ids, bounds, bounds[1:], strict=False):
        completions[rollout_id] = values[begin:end][microbatch.loss_mask[begin:end]].tolist()
    return completions


def _expert_choices(rollouts: Sequence[Rollout], bounds: Sequence[int], row_tokens: int) -> Tensor | None:
    """Return the routing record [T, L, K] of a row, -1 without a record; None if no rollout has a record."""
    records = [rollout.completion.expert_choices for rollout in rollouts]
    first = next((record for record in records if record is not None), None)
    if first is None:
        return None
    row = torch.full((row_tokens, *first.shape[1:]), -1, dtype=torch.int16)
    for record, begin, rollout in zip(records, bounds, rollouts, strict=False):  # the padding is one more segment
        if record is not None:
            if len(record) > rollout.num_tokens:
                raise ValueError(f"expert choices of {len(record)} tokens for a rollout of {rollout.num_tokens}")
            row[begin : begin + len(record)] = widen_record(record)
    return row


def _check(rollout: Rollout) -> None:
    num_tokens, num_log_probs = len(rollout.completion.token_ids), len(rollout.completion.sampler_log_probs)
    if num_tokens != num_log_probs:
        raise ValueError(f"a completion has {num_tokens} tokens and {num_log_probs} sampler_log_probs")
    mask = rollout.completion.loss_mask
    if mask is not None and len(mask) != num_tokens:
        raise ValueError(f"a completion has {num_tokens} tokens and a loss_mask of {len(mask)}")


def _total(rollouts: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in rollouts)


def _longest_first(rollouts: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(rollouts, key=lambda i: (-lengths[i], i))


def _spread(rollouts: Sequence[int], lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Assign rollouts longest first, each to the bin with the fewest tokens (on a tie, the first such bin)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0] * num_bins
    for i in _longest_first(rollouts, lengths):
        fewest = totals.index(min(totals))
        bins[fewest].append(i)
        totals[fewest] += lengths[i]
    return bins


def _first_fit(rollouts: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the bins of at most `max_tokens` tokens that first-fit decreasing finds."""
    bins: list[list[int]] = []
    totals: list[int] = []
    for i in _longest_first(rollouts, lengths):
        fits = next((b for b, total in enumerate(totals) if total + lengths[i] <= max_tokens), None)
        if fits is None:
            bins.append([])
            totals.append(0)
            fits = len(bins) - 1
        bins[fits].append(i)
        totals[fits] += lengths[i]
    return bins

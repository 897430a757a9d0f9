"""Ragged columns of tokens, by hand and against nested lists."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo_mega.data import rollout_tokens
from grpo_mega.data.rollout_tokens import (
    NOT_SAMPLED,
    RolloutTokens,
    means_per_rollout,
    offsets_of,
    ragged_index,
    sums_per_rollout,
)
from grpo_mega.types import Completion, Prompt, Reward, Rollout
from tests.helpers.token_values import token_values


def rollout(
    prompt: list[int], tokens: list[int], mask: list[bool] | None = None, experts: int | None = None
) -> Rollout:
    record = None
    if experts is not None:
        record = torch.full((experts, 1, 2), len(tokens), dtype=torch.uint8)
    log_probs = [-float(t) for t in tokens]
    completion = Completion(tokens, log_probs, "eos", len(tokens), "", expert_choices=record, loss_mask=mask)
    return Rollout(Prompt(0, "", tuple(prompt), ""), completion, Reward(0.0), 0)


THREE = [
    (2, rollout([11, 12], [13])),
    (5, rollout([21], [22, 23, 24], [True, False, True])),
    (9, rollout([31, 32, 33], [34, 35])),
]


def test_columns_by_hand() -> None:
    found = RolloutTokens.of(THREE)
    assert found.ids.tolist() == [2, 5, 9]
    assert found.offsets.tolist() == [0, 3, 7, 12]
    assert found.prompt_tokens.tolist() == [2, 1, 3]
    assert found.token_ids.tolist() == [11, 12, 13, 21, 22, 23, 24, 31, 32, 33, 34, 35]
    assert found.loss_mask.astype(int).tolist() == [0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 1, 1]
    assert found.sampler_log_probs.tolist() == [0, 0, -13, 0, -22, 0, -24, 0, 0, 0, -34, -35]
    no = NOT_SAMPLED
    assert found.policy_versions.tolist() == [no, no, 1, no, 3, no, 3, no, no, no, 2, 2]
    assert found.expert_choices is None
    assert found.loss_counts.tolist() == [1, 2, 2]
    assert found.loss_positions.tolist() == [0, 0, 2, 0, 1]
    columns = (found.token_ids, found.sampler_log_probs, found.loss_mask, found.policy_versions)
    assert [column.dtype for column in columns] == [np.int32, np.float32, np.bool_, np.int32]
    assert found.nbytes == 12 * (4 + 4 + 1 + 4) + 8 * (3 + 4 + 3)
    assert found.completion_tokens.tolist() == [1, 3, 2]
    assert found.of_prompts(found.token_ids).tolist() == [11, 12, 21, 31, 32, 33]
    assert found.of_completions(found.token_ids).tolist() == [13, 22, 23, 24, 34, 35]
    on_loss = found.on_loss_tokens(found.token_ids)
    assert on_loss.by_rollout() == {2: [13], 5: [22, 24], 9: [34, 35]}


@pytest.mark.parametrize("long_range", [1, 64])
def test_columns_of_short_and_of_long_rollouts_are_joined_alike(
    monkeypatch: pytest.MonkeyPatch, long_range: int
) -> None:
    monkeypatch.setattr(rollout_tokens, "_LONG_RANGE", long_range)
    found = RolloutTokens.of(THREE)
    assert found.loss_counts.tolist() == [1, 2, 2]
    assert found.of_completions(found.token_ids).tolist() == [13, 22, 23, 24, 34, 35]
    assert found.select(np.array([2, 0])).token_ids.tolist() == [31, 32, 33, 34, 35, 11, 12, 13]


def test_versions_of_tokens_that_several_weights_sampled() -> None:
    completion = replace(THREE[1][1].completion, policy_versions=[1, 7, 2])
    found = RolloutTokens.of([THREE[0], (5, replace(THREE[1][1], completion=completion)), THREE[2]])
    no = NOT_SAMPLED
    assert found.policy_versions.tolist() == [no, no, 1, no, 1, no, 2, no, no, no, 2, 2]
    with pytest.raises(ValueError, match="3 tokens and a policy_versions of 2"):
        replace(completion, policy_versions=[1, 2])


def test_no_rollouts_give_empty_columns() -> None:
    found = RolloutTokens.empty()
    assert len(found) == len(found.token_ids) == len(found.loss_counts) == 0
    assert found.offsets.tolist() == [0]
    assert found.of_completions(found.token_ids).dtype == np.int32


def test_a_selection_has_the_rollouts_in_the_given_order() -> None:
    found = RolloutTokens.of(THREE).select(np.array([2, 0]))
    assert found.ids.tolist() == [9, 2]
    assert found.token_ids.tolist() == [31, 32, 33, 34, 35, 11, 12, 13]
    assert found.offsets.tolist() == [0, 5, 8]
    assert RolloutTokens.of(THREE).select(np.array([False, True, False])).token_ids.tolist() == [21, 22, 23, 24]
    moved = RolloutTokens.of(THREE).with_ids(np.array([7, 1, 3]))
    assert moved.ids.tolist() == [1, 3, 7]
    assert moved.token_ids.tolist() == [21, 22, 23, 24, 31, 32, 33, 34, 35, 11, 12, 13]


def test_parts_are_joined_in_the_order_of_their_ids() -> None:
    first, second = RolloutTokens.of(THREE[1:2]), RolloutTokens.of([THREE[0], THREE[2]])
    joined, whole = RolloutTokens.concatenate([first, second]), RolloutTokens.of(THREE)
    for name in ("ids", "offsets", "prompt_tokens", "token_ids", "sampler_log_probs", "loss_mask", "policy_versions"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))


def test_tokens_without_a_routing_record_are_marked() -> None:
    found = RolloutTokens.of([(0, rollout([1], [2, 3], experts=2)), (1, rollout([4], [5]))])
    assert found.expert_choices is not None
    assert found.expert_choices.dtype == np.uint8
    assert found.expert_choices[:, 0, 0].tolist() == [2, 2, 255, 255, 255]
    joined = RolloutTokens.concatenate([RolloutTokens.of([(2, rollout([6], [7]))]), found])
    assert joined.expert_choices is not None
    assert joined.expert_choices[:, 0, 1].tolist() == [2, 2, 255, 255, 255, 255, 255]
    with pytest.raises(ValueError, match="expert choices of 4 tokens for a rollout of 3"):
        RolloutTokens.of([(0, rollout([1], [2, 3], experts=4))])


def test_a_ragged_index_equals_nested_ranges() -> None:
    rng = random.Random(0)
    for _ in range(50):
        starts = [rng.randrange(100) for _ in range(rng.randrange(6))]
        counts = [rng.randrange(4) for _ in starts]
        expected = [i for start, count in zip(starts, counts, strict=True) for i in range(start, start + count)]
        assert ragged_index(np.array(starts, np.int64), np.array(counts, np.int64)).tolist() == expected


def test_sums_and_means_of_each_rollout() -> None:
    values = token_values([[0.1] * 10, [], [1.0, 2.0], []])
    assert sums_per_rollout(values).tolist() == pytest.approx([1.0, 0.0, 3.0, 0.0])
    assert means_per_rollout(values).tolist() == [0.1, 0.0, 1.5, 0.0]  # of equal numbers exactly this number
    assert sums_per_rollout(token_values([])).tolist() == means_per_rollout(token_values([])).tolist() == []
    assert offsets_of(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]

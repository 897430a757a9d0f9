"""Rows of examples: which positions are trained, and the one denominator of an update."""

from __future__ import annotations

from array import array

import pytest
import torch

from grpo_mega.config.schema import TrainConfig
from grpo_mega.data.example_dataset import Example
from grpo_mega.data.row_plan import RowShape
from grpo_mega.trainer.example_batch import build_example_batch, example_tokens
from grpo_mega.types import UserError

MULTI_TURN = Example(0, array("i", [5, 6, 7, 8, 9, 10]), bytes([0, 0, 1, 0, 1, 1]))
SHORT = Example(1, array("i", [11, 12]), bytes([0, 1]))
LAST_UNTRAINED = Example(2, array("i", [13, 14, 15, 16]), bytes([0, 1, 1, 0]))


def train_config(max_tokens: int, minibatches: int = 1) -> TrainConfig:
    return TrainConfig(
        objective="sft", steps=1, minibatches_per_epoch=minibatches, max_tokens_per_microbatch=max_tokens
    )


def test_every_trained_token_is_predicted_at_the_position_before_it() -> None:
    batch = build_example_batch([MULTI_TURN, SHORT], train_config(8), dp=1, dp_rank=0, shape=RowShape())
    (row,) = batch.microbatches
    assert row.token_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert row.labels[row.loss_mask].tolist() == [7, 9, 10, 12]
    assert row.loss_mask.nonzero().squeeze(1).tolist() == [1, 3, 4, 6]
    assert row.cu_seqlens.tolist() == [0, 6, 8]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


def test_the_weight_is_one_over_the_trained_tokens_of_all_ranks_and_microbatches() -> None:
    examples = [MULTI_TURN, SHORT, LAST_UNTRAINED]
    for dp in (1, 2, 3):
        rows = [
            row
            for rank in range(dp)
            for row in build_example_batch(
                examples, train_config(6), dp=dp, dp_rank=rank, shape=RowShape()
            ).microbatches
        ]
        weights = torch.cat([row.token_weights for row in rows])
        assert sorted(weights.tolist(), reverse=True)[:6] == pytest.approx([1 / 6] * 6)
        assert weights.count_nonzero() == 6


def test_each_minibatch_has_its_own_denominator() -> None:
    batch = build_example_batch(
        [MULTI_TURN, LAST_UNTRAINED], train_config(8, minibatches=2), dp=1, dp_rank=0, shape=RowShape()
    )
    sums = [sum(float(row.token_weights.sum()) for row in minibatch) for minibatch in batch.minibatches]
    assert sums == pytest.approx([1.0, 1.0])


def test_an_example_keeps_its_tokens_as_a_rollout() -> None:
    found = example_tokens([LAST_UNTRAINED, MULTI_TURN, SHORT], [1, 2])
    assert found.ids.tolist() == [1, 2]
    assert found.token_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert found.prompt_tokens.tolist() == [2, 1]
    assert found.loss_mask.astype(int).tolist() == [0, 0, 1, 0, 1, 1, 0, 1]


def test_an_example_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(UserError, match=r"train\.max_tokens_per_microbatch=5"):
        build_example_batch([MULTI_TURN], train_config(5), dp=1, dp_rank=0, shape=RowShape())

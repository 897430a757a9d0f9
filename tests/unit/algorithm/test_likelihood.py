"""The loss of supervised fine-tuning against a number that was computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from grpo_mega.algorithm.likelihood import LikelihoodLoss
from grpo_mega.types import Completion, Prompt, Reward, Rollout
from tests.helpers.packing import pack


def test_the_loss_of_an_update_is_the_mean_of_minus_the_log_probs_of_the_trained_tokens() -> None:
    completion = Completion((3, 4, 5), (0.0,) * 3, "eos", 0, "", loss_mask=(True, False, True))
    rollout = Rollout(Prompt(0, "", (1, 2), ""), completion, Reward(None), 0)
    row = pack([(0, rollout)], row_tokens=6, advantages=[0.0], token_weights=[1 / 2], pad_id=0)
    # the tokens 3 and 5 are predicted at positions 1 and 3, with probabilities 1/2 and 1/8
    log_probs = torch.tensor([0.5, math.log(1 / 2), -7.0, math.log(1 / 8), math.nan, math.inf], requires_grad=True)
    loss, metrics = LikelihoodLoss()(log_probs, torch.full((6,), 0.25), row)
    total = (loss * row.token_weights).sum()
    assert total.item() == pytest.approx((math.log(2) + math.log(8)) / 2)
    total.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [0.0, -0.5, 0.0, -0.5, 0.0, 0.0]
    assert metrics["entropy"].tolist() == [0.0, 0.25, 0.0, 0.25, 0.0, 0.0]
    assert not LikelihoodLoss().needs_reference


def test_a_row_without_trained_tokens_has_loss_zero() -> None:
    row = pack([], row_tokens=4, advantages=[], token_weights=[], pad_id=0)
    loss, _ = LikelihoodLoss()(torch.full((4,), -math.inf), torch.zeros(4), replace(row))
    assert loss.tolist() == [0.0] * 4

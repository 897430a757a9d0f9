"""Metrics of tokens that several ranks have, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo_mega.data.rollout_tokens import RolloutTokens
from grpo_mega.parallel.topology import Topology
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.trainer.token_metrics import critic_metrics, num_recorded
from grpo_mega.types import Completion, Prompt, Reward, Rollout
from tests.helpers.thread_ranks import on_ranks
from tests.helpers.token_values import token_values


@pytest.mark.parametrize("tp", [1, 2])
def test_the_metrics_of_a_critic_by_hand(tp: int) -> None:
    """Two data-parallel ranks have the tokens; ranks with the same rollouts count once."""

    def of_rank(transfer: RolloutTransfer) -> dict[str, float]:
        values, returns = [([[0.0, 1.0]], [[1.0, 1.0]]), ([[1.0]], [[4.0]])][transfer.ranks.at.dp_rank]
        return critic_metrics(token_values(values), token_values(returns), transfer)

    for found in on_ranks(Topology(2 * tp, tp=tp), of_rank):
        assert found == pytest.approx(
            {
                "critic/value_mean": 2 / 3,
                "critic/return_mean": 2.0,
                "critic/explained_variance": 1 - (14 / 9) / 2,  # errors 1, 0, 3; returns 1, 1, 4
            }
        )


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8])
def test_tokens_with_a_routing_record_are_counted(dtype: torch.dtype) -> None:
    def rollout(num_prompt_tokens: int, num_tokens: int) -> Rollout:
        completion = Completion([1] * num_tokens, [-1.0] * num_tokens, "eos", 0, "")
        return Rollout(Prompt(0, "", (1,) * num_prompt_tokens, ""), completion, Reward(0.0), 0)

    rollouts = [rollout(3, 2), rollout(3, 1), rollout(5, 3), rollout(5, 2)]
    assert num_recorded(RolloutTokens.of(list(enumerate(rollouts)))) == 0
    for i, num_tokens in ((0, 4), (2, 5)):  # all that predict, and the first of three
        choices = torch.zeros(num_tokens, 2, 2, dtype=dtype)
        choices[0] = -1 if dtype == torch.int16 else 255  # in the prompt: not trained on
        rollouts[i] = replace(rollouts[i], completion=replace(rollouts[i].completion, expert_choices=choices))
    tokens = RolloutTokens.of(list(enumerate(rollouts)))
    assert tokens.expert_choices is not None
    assert tokens.expert_choices.dtype == np.dtype(str(dtype).removeprefix("torch."))
    assert num_recorded(tokens) == 3

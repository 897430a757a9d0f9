"""Metrics of tokens that several ranks have, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo_mega.data.rollout_tokens import RolloutTokens
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.carried_rollouts import CarriedRollouts, PromptShard
from grpo_mega.rollout.sampled_groups import StepCarry
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.trainer.token_metrics import critic_metrics, num_recorded, staleness_metrics, staleness_of
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


def test_staleness_by_hand() -> None:
    """Ages of trained tokens on two ranks: 4, 4, 0 and 0, 0; a rank without rollouts counts nothing."""
    several = Completion([1, 2, 3, 4], [-1.0] * 4, "eos", 9, "", loss_mask=[1, 1, 0, 1], policy_versions=[5, 5, 2, 9])
    present = Completion([1, 2], [-1.0] * 2, "eos", 9, "")
    carry = StepCarry(CarriedRollouts.after_step(2, PromptShard(0, 3, 6)), 9, num_dropped=2, num_groups=3, num_tokens=7)
    ranks = [
        RolloutTokens.of([(i, Rollout(Prompt(0, "", (1, 2), ""), c, Reward(0.0), 0)) for i, c in enumerate(of_rank)])
        for of_rank in ([several], [present], [])
    ]
    found = staleness_metrics(np.stack([staleness_of(tokens, carry) for tokens in ranks]), carry)
    assert found == {
        "rollout/staleness_mean": 8 / 5,
        "rollout/staleness_max": 4.0,
        "rollout/carried_fraction": 2 / 5,
        "rollout/dropped_groups": 2.0,
        "rollout/carried_groups": 3.0,
        "rollout/carried_tokens": 7.0,
    }

"""The balance loss of routers on numbers that were worked out by hand."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.policy.modules.router_aux_loss import balance_loss, expert_counts, segments_of

# A rollout of three tokens, its padding, a rollout of one token, a padding segment; E = 3 experts, K = 1.
BOUNDS = torch.tensor([0, 4, 5, 7], dtype=torch.int32)
MASK = torch.tensor([True, True, True, False, True, False, False])
CHOICES = torch.tensor([0, 0, 2, 1, 1, 1, 1])
SCORES = torch.tensor(
    [[0.5, 0.25, 0.25], [0.75, 0.0, 0.25], [0.25, 0.25, 0.5], [0, 0, 0], [0.25, 0.5, 0.25], [0, 0, 0], [0, 0, 0]]
)


def row_counts(choices: torch.Tensor = CHOICES, experts: int = 3) -> torch.Tensor:
    chosen = torch.nn.functional.one_hot(choices, experts).bool()
    return expert_counts(chosen, MASK, segments_of(BOUNDS), 3)


def test_segments_and_counts_leave_out_the_padding() -> None:
    assert segments_of(BOUNDS).tolist() == [0, 0, 0, 0, 1, 2, 2]
    assert row_counts().tolist() == [[2, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_loss_and_gradient_by_hand() -> None:
    # first rollout:  f = 3/3 (2, 0, 1) = (2, 0, 1), P = (1.5, 0.5, 1) / 3: sum f P = 3/3 + 1/3 = 4/3
    # second rollout: f = 3 (0, 1, 0), P = (0.25, 0.5, 0.25): sum f P = 1.5
    scores = SCORES.clone().requires_grad_()
    loss = balance_loss(scores, row_counts(), segments_of(BOUNDS), 1, 0.5)
    assert loss.item() == pytest.approx(0.5 * (4 / 3 + 1.5), rel=1e-6)
    loss.backward()
    assert scores.grad is not None
    none = [0.0, 0.0, 0.0]
    first, second = [0.5 * 2 / 3, 0.0, 0.5 * 1 / 3], [0.0, 0.5 * 3, 0.0]  # coef f / T
    torch.testing.assert_close(scores.grad, torch.tensor([first, first, first, first, second, none, none]))


def test_ranks_that_share_a_rollout_add_up_to_its_loss() -> None:
    whole = balance_loss(SCORES, row_counts(), segments_of(BOUNDS), 1, 0.5)
    parts = [balance_loss(SCORES[i], row_counts(), segments_of(BOUNDS)[i], 1, 0.5) for i in ([0, 3, 5], [1, 2, 4, 6])]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("topk", [1, 2])
def test_a_balanced_load_with_equal_scores_has_loss_one(topk: int) -> None:
    experts = 4
    chosen = torch.stack([torch.arange(experts).roll(-i) < topk for i in range(experts)])
    segments = torch.zeros(experts, dtype=torch.int64)
    counts = expert_counts(chosen, torch.ones(experts, dtype=torch.bool), segments, 1)
    loss = balance_loss(torch.full((experts, experts), 1 / experts), counts, segments, topk, 1.0)
    assert float(loss) == pytest.approx(1.0, rel=1e-6)

"""Group advantages against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.algorithm.advantage import group_advantages, leave_one_out_advantages, token_returns, whitened


def test_one_right_of_four_gives_the_hand_computed_advantages() -> None:
    # mean 1/4; sum of squared deviations 3/4; sample variance 1/4; std 1/2
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), eps=0.0)
    assert advantages.tolist() == [[1.5, -0.5, -0.5, -0.5]]


def test_std_divides_by_g_minus_one() -> None:
    # deviations -1, 1: with n - 1 the std is sqrt(2), with n it would be 1
    advantages = group_advantages(torch.tensor([[0.0, 2.0]]), eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[-(0.5**0.5), 0.5**0.5]]), rtol=1e-7, atol=0)


def test_eps_is_added_to_the_std() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), eps=0.25)
    torch.testing.assert_close(advantages, torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("reward", [0.0, 0.1, -0.3, 1e-30, 1e30])
@pytest.mark.parametrize("group_size", [2, 3, 7, 16])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_equal_rewards_give_exactly_zero(reward: float, group_size: int, eps: float) -> None:
    advantages = group_advantages(torch.full((2, group_size), reward), eps=eps)
    assert (advantages == 0).all()


def test_groups_do_not_mix() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.1, 0.1], [100.0, 300.0]])
    alone = torch.cat([group_advantages(row.unsqueeze(0)) for row in rewards])
    assert torch.equal(group_advantages(rewards), alone)


def test_a_small_difference_on_a_large_reward_survives() -> None:
    advantages = group_advantages(torch.tensor([[1e7, 1e7 + 1, 1e7, 1e7]]))
    torch.testing.assert_close(advantages, torch.tensor([[-0.5, 1.5, -0.5, -0.5]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 0)])
def test_a_group_of_less_than_two_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="G >= 2"):
        group_advantages(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_named(value: float) -> None:
    rewards = torch.zeros(3, 4)
    rewards[1, 2] = value
    with pytest.raises(ValueError, match="prompt 1, rollout 2"):
        group_advantages(rewards)


def test_without_a_scale_the_mean_is_all_that_goes() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]]), scale="none")
    assert advantages.tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    advantages = leave_one_out_advantages(torch.tensor([[1.0, 4.0, 10.0], [0.1, 0.1, 0.1]]))
    torch.testing.assert_close(advantages, torch.tensor([[-6.0, -1.5, 7.5], [0.0] * 3]), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="G >= 2"):
        leave_one_out_advantages(torch.zeros(3, 1))


def test_whitened_values_have_mean_zero_and_std_one_over_all_tokens() -> None:
    # 3 tokens of value 0 and one of value 4: mean 1, std sqrt(3)
    values = whitened([[0.0, 0.0], [4.0], [], [0.0]], eps=0.0)
    assert values == [pytest.approx([-(3**-0.5)] * 2), pytest.approx([3**0.5]), [], pytest.approx([-(3**-0.5)])]
    assert whitened([[2.0, 2.0], [2.0]]) == [[0.0, 0.0], [0.0]]
    with pytest.raises(ValueError, match="not finite"):
        whitened([[float("nan")]])


def test_token_returns_subtract_the_penalties_from_a_token_on() -> None:
    assert token_returns(10.0, [1.0, 2.0, 4.0]) == [3.0, 4.0, 6.0]
    assert token_returns(10.0, []) == []

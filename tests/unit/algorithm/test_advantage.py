"""Group advantages against numbers worked out by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from grpo_mega.algorithm.advantages.group_relative import group_advantages, leave_one_out_advantages
from grpo_mega.algorithm.advantages.process import later_gains, process_gains
from grpo_mega.algorithm.advantages.whitened import token_returns, whitened
from tests.helpers.token_values import as_lists, own_tokens, token_values


def process_advantages(
    steps: list[list[tuple[int, float]]], lengths: list[int], size: int, eps: float = 1e-6
) -> list[list[float]]:
    gains = process_gains(steps, lengths, size, eps)
    return [later_gains(row, length).tolist() for row, length in zip(gains, lengths, strict=True)]


def whitened_lists(rows: list[list[float]], eps: float = 1e-8) -> list[list[float]]:
    own = own_tokens([range(len(row)) for row in rows])
    return as_lists(own.positions.with_values(whitened(token_values(rows).values, own, eps)))


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
def test_a_group_of_fewer_than_two_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="G >= 2"):
        group_advantages(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_named(value: float) -> None:
    rewards = torch.zeros(3, 4)
    rewards[1, 2] = value
    with pytest.raises(ValueError, match="prompt 1, rollout 2"):
        group_advantages(rewards)


def test_without_a_scale_only_the_mean_is_subtracted() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]]), scale="none")
    assert advantages.tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    advantages = leave_one_out_advantages(torch.tensor([[1.0, 4.0, 10.0], [0.1, 0.1, 0.1]]))
    torch.testing.assert_close(advantages, torch.tensor([[-6.0, -1.5, 7.5], [0.0] * 3]), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="G >= 2"):
        leave_one_out_advantages(torch.zeros(3, 1))


def test_whitened_values_have_mean_zero_and_std_one_over_all_tokens() -> None:
    # 3 tokens of value 0 and one of value 4: mean 1, std sqrt(3)
    values = whitened_lists([[0.0, 0.0], [4.0], [], [0.0]], eps=0.0)
    assert values == [pytest.approx([-(3**-0.5)] * 2), pytest.approx([3**0.5]), [], pytest.approx([-(3**-0.5)])]
    assert whitened_lists([[2.0, 2.0], [2.0]]) == [[0.0, 0.0], [0.0]]
    with pytest.raises(ValueError, match="not finite"):
        whitened_lists([[float("nan")]])


def test_token_returns_subtract_the_penalties_from_a_token_on() -> None:
    found = token_returns(np.array([10.0, 1.0, 5.0]), token_values([[1.0, 2.0, 4.0], [], [0.5]]))
    assert found.tolist() == [3.0, 4.0, 6.0, 4.5]


def process_oracle(steps: list[list[tuple[int, float]]], lengths: list[int]) -> list[list[float]]:
    """DeepSeekMath's formula for one group, term by term in float64: R has the values of all steps of all outputs."""
    every = [value for row in steps for _, value in row]
    mean = sum(every) / len(every)
    std = (sum((value - mean) ** 2 for value in every) / (len(every) - 1)) ** 0.5
    return [
        [sum((value - mean) / (std + 1e-6) for index, value in row if index >= t) for t in range(length)]
        for row, length in zip(steps, lengths, strict=True)
    ]


def test_process_advantages_by_hand() -> None:
    # values 1 0 | 0 1: mean 1/2, std 1/sqrt(3), each step counts +-sqrt(3)/2
    steps = [[(1, 1.0), (3, 0.0)], [(0, 0.0), (2, 1.0)]]
    h = 3**0.5 / 2
    found = process_advantages(steps, [5, 3], 2, eps=0.0)
    assert found[0] == pytest.approx([0.0, 0.0, -h, -h, 0.0])
    assert found[1] == pytest.approx([0.0, h, h])


def test_process_advantages_equal_the_papers_formula_on_random_groups() -> None:
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 12) for _ in range(6)]
        steps = [[(rng.randrange(n), rng.gauss(0, 1)) for _ in range(rng.randint(0, 4))] for n in lengths]
        steps[0] = [(0, 0.5)]
        steps[1] = [(lengths[1] - 1, -0.5)]
        found = process_advantages(steps + steps, lengths * 2, 6)
        for row, wanted in zip(found, process_oracle(steps, lengths) * 2, strict=True):
            assert row == pytest.approx(wanted, abs=1e-12)


def test_one_step_per_rollout_is_outcome_supervision() -> None:
    rewards = [0.3, 0.9, 0.1, 0.1]
    expected = group_advantages(torch.tensor([rewards], dtype=torch.float64)).flatten().tolist()
    found = process_advantages([[(4, value)] for value in rewards], [5] * 4, 4)
    assert found == [pytest.approx([value] * 5, rel=1e-6) for value in expected]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e30])
def test_equal_values_of_all_steps_give_exactly_zero(value: float) -> None:
    assert process_advantages([[(0, value), (2, value)], [(1, value)]], [3, 2], 2) == [[0.0] * 3, [0.0] * 2]
    assert process_advantages([[], []], [2, 1], 2) == [[0.0] * 2, [0.0]]


def test_a_step_outside_of_its_rollout_and_a_value_that_is_not_finite_are_errors() -> None:
    with pytest.raises(ValueError, match=r"token 3 .*3 tokens"):
        process_advantages([[(3, 1.0)], [(0, 0.0)]], [3, 3], 2)
    with pytest.raises(ValueError, match="rollouts 0 to 1 is not finite"):
        process_advantages([[(0, float("nan"))], [(0, 0.0)]], [3, 3], 2)

"""Config section `algorithm`: presets, rules between keys, credit of a step. Losses are in test_algorithms.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_mega.algorithm.base import OwnTokens
from grpo_mega.config.algorithm_presets import ALGORITHM_DEFAULTS
from grpo_mega.config.algorithm_rules import check_algorithm
from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.data.rollout_tokens import sums_per_rollout
from grpo_mega.trainer.objective import Objective
from grpo_mega.types import Completion, Prompt, Reward, Rollout, UpdateStats, UserError
from tests.helpers.recorded_rollouts import RolloutGroups
from tests.helpers.token_values import as_lists, token_values


def make_groups(lengths: list[int], rewards: list[float], size: int = 2) -> RolloutGroups:
    rollouts = [
        Rollout(Prompt(i // size, "", (0,), ""), Completion((0,) * n, (0.0,) * n, "eos", 0, ""), Reward(r), 0)
        for i, (n, r) in enumerate(zip(lengths, rewards, strict=True))
    ]
    return RolloutGroups(rollouts, size)


@dataclass(frozen=True)
class ListedCredit:
    """Credit and token weights as lists, per rollout."""

    advantages: list[list[float]]
    returns: list[list[float]]
    token_weights: list[float]
    is_trained: list[bool]

    @property
    def per_rollout(self) -> list[float]:
        """Advantage of each rollout, whose loss tokens all have the same."""
        assert all(len(set(row)) == 1 for row in self.advantages)
        return [row[0] for row in self.advantages]


def credit(
    objective: Objective,
    given: RolloutGroups,
    rewards: Sequence[float | None],
    kl: list[list[float]] | None = None,
    values: list[list[float]] | None = None,
    minibatches: list[range] | None = None,
) -> ListedCredit:
    """Compute the credit on one rank."""
    groups = given.sampled()
    known = np.array([np.nan if reward is None else reward for reward in rewards])
    positions = groups.tokens.on_loss_tokens(groups.tokens.loss_mask).with_values(groups.tokens.loss_positions)
    own, totals = OwnTokens(positions, values=None if values is None else token_values(values)), None
    if kl is not None:
        penalties = token_values([[objective.algorithm.kl_coef * k for k in row] for row in kl])
        own, totals = replace(own, penalties=penalties), sums_per_rollout(penalties)
    found = objective.credit(groups, known, own, totals)
    weights = objective.token_weights(groups, known, minibatches)
    returns = [] if found.returns is None else as_lists(found.returns)
    return ListedCredit(as_lists(found.advantages), returns, weights.weights.tolist(), weights.is_trained.tolist())


@pytest.mark.parametrize("name", ALGORITHM_DEFAULTS)
def test_every_name_passes_its_own_rules_and_survives_a_round_trip(name: str) -> None:
    algorithm = AlgorithmConfig(name=name)
    check_algorithm(algorithm)
    assert AlgorithmConfig(**algorithm.model_dump()) == algorithm
    for key, value in ALGORITHM_DEFAULTS[name].items():
        assert getattr(algorithm, key) == value


def test_a_key_that_is_set_takes_precedence_over_the_preset_of_the_name() -> None:
    algorithm = AlgorithmConfig(name="dapo", clip_high=0.3, correction="token_masked", correction_low=0.25)
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.aggregation) == (0.2, 0.3, "token_mean")
    assert (algorithm.correction_low, algorithm.correction_high) == (0.25, 5.0)


@pytest.mark.parametrize(
    ("keys", "start", "remedy"),
    [
        ({"name": "sapo", "clip_low": 0.2}, "algorithm.clip_low=0.2", "null"),
        ({"clip_high": None}, "algorithm.clip_high=null, but algorithm.surrogate=clipped_ratio", "surrogate"),
        ({"aggregation_length": 100.0}, "algorithm.aggregation_length=100.0", "aggregation=rollout_sum"),
        ({"correction_high": 3.0}, "algorithm.correction_high=3.0", "algorithm.correction"),
        ({"correction": "token_truncated", "correction_low": 0.5}, "algorithm.correction_low=0.5", "leave it out"),
        ({"correction": "token_masked", "correction_low": None}, "algorithm.correction_low=null", "set it"),
        ({"overlong_penalty": 2.0}, "algorithm.overlong_penalty=2.0", "set it"),
        ({"name": "reinforce_plus_plus", "degenerate": "drop"}, "algorithm.degenerate=drop", "degenerate=keep"),
        ({"kl_coef": 0.0, "ref_update_every": 5}, "algorithm.ref_update_every=5", "kl_coef"),
        ({"kl_target": 0.1, "kl_estimator": "k1"}, "algorithm.kl_target=0.1", "kl_estimator=k3"),
        ({"name": "ppo", "degenerate": "drop"}, "algorithm.degenerate=drop", "degenerate=keep"),
        ({"name": "ppo", "gamma": None}, "algorithm.gamma=null, but algorithm.advantage=gae", "1.0 is usual"),
        ({"gamma": 0.9}, "algorithm.gamma=0.9", "advantage=gae"),
        ({"value_clip": 0.2}, "algorithm.value_clip=0.2", "advantage=gae"),
        ({"refill_rounds": 3}, "algorithm.refill_rounds=3", "leave it out"),
    ],
)
def test_each_rule_names_key_value_and_remedy(keys: dict[str, object], start: str, remedy: str) -> None:
    with pytest.raises(UserError) as error:
        check_algorithm(AlgorithmConfig(**keys))  # type: ignore[arg-type]
    assert str(error.value).startswith(start)
    assert remedy in str(error.value)[len(start) :]


def test_credit_of_two_rollouts_with_a_critic_by_hand() -> None:
    algorithm = AlgorithmConfig(name="ppo", gae_lambda=1.0, kl_coef=0.5, critic_lr_factor=3.0)
    objective = Objective(algorithm, max_tokens=16)
    given = make_groups([2, 1], [1.0, 0.0])
    assert credit(objective, given, [1.0, 0.0]).per_rollout == [0.0, 0.0]  # the values are not known yet
    found = credit(objective, given, [1.0, 0.0], kl=[[0.5, -0.5], [1.0]], values=[[0.5, 0.75], [0.25]])
    # returns: 1 + 0.25 - 0.25, 1 + 0.25, -0.5; less the values: 0.5, 0.5, -0.75, which have mean 1/12
    assert found.returns == [[1.0, 1.25], [-0.5]]
    std = ((2 * (5 / 12) ** 2 + (10 / 12) ** 2) / 3) ** 0.5
    assert found.advantages[0] == pytest.approx([5 / 12 / std] * 2)
    assert found.advantages[1] == pytest.approx([-10 / 12 / std])
    assert objective.critic_rate(2e-6) == pytest.approx(6e-6)
    assert objective.value_loss().clip == 0.2


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_step_values_are_earned_at_their_end_tokens_as_in_the_float64_sum(gamma: float, gae_lambda: float) -> None:
    """One rollout has steps and a masked tool result, whose step counts for the token before; one has an outcome."""
    given = with_masks(make_groups([6, 4], [0.5, 1.0]), "110011", "1111")
    first, second = given.rollouts
    given = replace(given, rollouts=[replace(first, steps=((5, -0.5), (0, 1.0), (3, 0.75), (1, 0.25))), second])
    values = torch.tensor([[0.3, -0.2, 0.7, 0.1], [0.2, 0.6, -0.4, 0.5]], dtype=torch.float64)
    kl = torch.tensor([[0.1, 0.2, -0.1, 0.4], [0.3, 0.0, 0.2, -0.2]], dtype=torch.float64)
    algorithm = AlgorithmConfig(name="ppo", gamma=gamma, gae_lambda=gae_lambda, kl_coef=0.5)
    # the reward of the first is 0.125 below the mean of its steps, as after an overlong penalty
    found = credit(Objective(algorithm, 16), given, [0.375, 1.0], kl.tolist(), values.tolist())

    earned = torch.tensor([[1.0, 1.0, 0.0, -0.625], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64) - 0.5 * kl
    deltas = earned + gamma * torch.cat([values[:, 1:], torch.zeros(2, 1, dtype=torch.float64)], 1) - values
    distance = torch.arange(4)[None] - torch.arange(4)[:, None]
    weights = torch.where(distance >= 0, (gamma * gae_lambda) ** distance.double(), 0.0)
    wanted = deltas @ weights.T
    torch.testing.assert_close(torch.tensor(found.returns, dtype=torch.float64), wanted + values, rtol=0, atol=1e-12)
    whitened = (wanted - wanted.mean()) / (wanted.std(correction=0) + 1e-8)
    torch.testing.assert_close(torch.tensor(found.advantages, dtype=torch.float64), whitened, rtol=0, atol=1e-12)


def test_the_overlong_penalty_falls_linearly_over_the_buffer() -> None:
    keys = {"advantage": "group_mean", "overlong_penalty": 2.0, "overlong_buffer_fraction": 0.25}
    objective = Objective(AlgorithmConfig.model_validate(keys), max_tokens=16)
    given = make_groups([4, 12, 13, 16], [1.0] * 4, size=4)
    # the rewards become 1, 1, 0.5 and -2: their mean is 0.125
    assert credit(objective, given, [1.0, 1.0, 1.0, 0.0]).per_rollout == [0.875, 0.875, 0.375, -2.125]
    without = Objective(AlgorithmConfig(advantage="group_mean"), 16)
    assert credit(without, make_groups([16, 16], [1.0, 0.0]), [1.0, 0.0]).per_rollout == [0.5, -0.5]


def test_a_group_is_degenerate_by_its_rewards_before_the_overlong_penalty() -> None:
    objective = Objective(AlgorithmConfig(degenerate="drop", overlong_buffer_fraction=0.5), max_tokens=16)
    given = make_groups([4, 16, 4, 4], [1.0, 1.0, 1.0, 0.0])
    rewards = [r.reward.value for r in given.rollouts]
    whole = credit(objective, given, rewards)
    assert whole.is_trained == [False, False, True, True]
    assert whole.token_weights == [0.0, 0.0, 1 / 8, 1 / 8]
    assert credit(objective, given, rewards, minibatches=[range(2), range(2, 4)]).token_weights == whole.token_weights


def test_advantages_over_the_batch_allow_groups_of_one() -> None:
    given = make_groups([1, 3], [4.0, 0.0], size=1)
    algorithm = AlgorithmConfig(name="reinforce_plus_plus", kl_coef=0.0)
    found = credit(Objective(algorithm, 16), given, [4.0, 0.0]).advantages
    assert found == [pytest.approx([3**0.5]), pytest.approx([-(3**-0.5)] * 3)]


def test_a_kl_penalty_in_the_reward_is_not_in_the_loss() -> None:
    in_reward = Objective(AlgorithmConfig(name="rloo"), 16)
    assert in_reward.kl_in_reward
    assert not in_reward.loss().needs_reference
    assert not Objective(AlgorithmConfig(name="rloo", kl_coef=0.0), 16).kl_in_reward


@pytest.mark.parametrize(
    ("kls", "factor"),
    [((0.1, 0.1), 1.0), ((0.1, 0.12), 1.01), ((9.0, 9.0), 1.02), ((0.09, 0.09), 0.99), ((0.0, 0.0), 0.98)],
)
def test_the_kl_coefficient_follows_the_step_s_mean_kl(kls: tuple[float, float], factor: float) -> None:
    updates = [UpdateStats(1.0, 1e-6, {"kl": kl}, {}) for kl in kls]
    objective = Objective(AlgorithmConfig(kl_target=0.1), 16).at(0.5)
    assert objective.next_kl_coef(updates) == pytest.approx(0.5 * factor, rel=1e-12)
    assert objective.next_kl_coef([]) == 0.5  # all updates were skipped
    assert objective.loss().kl_coef == 0.5
    assert Objective(AlgorithmConfig(), 16).next_kl_coef(updates) is None
    assert Objective(AlgorithmConfig(), 16).at(None).loss().kl_coef == 0.04


def with_masks(found: RolloutGroups, *masks: str) -> RolloutGroups:
    """Return the groups with loss masks; 0 marks tokens that an environment wrote."""
    rollouts = [
        replace(r, completion=replace(r.completion, loss_mask=tuple(own == "1" for own in mask)))
        for r, mask in zip(found.rollouts, masks, strict=True)
    ]
    return replace(found, rollouts=rollouts)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("rollout_mean", [1 / (2 * 2), 1 / (3 * 2)]),
        ("token_mean", [1 / 5, 1 / 5]),
        ("group_token_mean", [1 / 5, 1 / 5]),
        ("rollout_sum", [1 / (8 * 2), 1 / (8 * 2)]),
    ],
)
def test_denominators_count_the_tokens_that_the_policy_sampled(aggregation: str, expected: list[float]) -> None:
    found = with_masks(make_groups([4, 6], [1.0, 0.0]), "1001", "011100")
    objective = Objective(AlgorithmConfig.model_validate({"aggregation": aggregation}), max_tokens=8)
    assert credit(objective, found, [1.0, 0.0]).token_weights == pytest.approx(expected)


def test_advantages_per_token_have_one_for_each_token_that_the_policy_sampled() -> None:
    found = with_masks(make_groups([4, 6], [1.0, 0.0]), "1001", "011100")
    for name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        advantages = credit(Objective(AlgorithmConfig.model_validate({"name": name}), 8), found, [1.0, 0.0]).advantages
        assert [len(row) for row in advantages if isinstance(row, list)] == [2, 3]


def test_process_supervision_gives_a_number_per_trained_token_from_the_steps_of_the_whole_group() -> None:
    found = with_masks(make_groups([4, 3], [0.5, 1.0]), "1001", "111")
    first, second = found.rollouts
    found = replace(found, rollouts=[replace(first, steps=((0, 1.0), (3, 0.0))), second])
    objective = Objective(AlgorithmConfig(advantage="process"), 8)
    # values 1, 0 and (the outcome of the second) 1: mean 2/3, std sqrt(1/3)
    up, down = (1 / 3) / 3**-0.5, (-2 / 3) / 3**-0.5
    first_row, second_row = credit(objective, found, [0.5, 1.0]).advantages
    assert first_row == pytest.approx([up + down, down], abs=1e-5)
    assert second_row == pytest.approx([up] * 3, abs=1e-5)
    assert not found.sampled().degenerate[0]
    assert make_groups([4, 3], [0.5, 0.5]).sampled().degenerate[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kl_in": "reward"}, "algorithm.kl_in=reward with algorithm.advantage=process"),
        ({"name": "dapo"}, "algorithm.overlong_buffer_fraction=0.2 with algorithm.advantage=process"),
    ],
)
def test_process_supervision_rejects_keys_for_rewards_of_whole_rollouts(keys: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_algorithm(AlgorithmConfig.model_validate(keys | {"advantage": "process"}))


GAPS = [3.0, 1.0, None, None, None, None, 5.0, None, None, 0.0, 1.0, 2.0]
"""Rewards of four groups of three: one rollout could not be scored, then all, then two, then none."""
GAP_LENGTHS = [2, 1, 4, 1, 1, 1, 1, 3, 3, 1, 2, 1]


def gap_groups() -> RolloutGroups:
    found = make_groups(GAP_LENGTHS, [0.0] * 12, size=3)
    rollouts = [replace(r, reward=Reward(value)) for r, value in zip(found.rollouts, GAPS, strict=True)]
    return replace(found, rollouts=rollouts)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        # group 1: mean 2, std (n - 1) sqrt(2); group 3 has one reward; group 4: mean 1, std 1
        ({"advantage": "group_std"}, [0.5**0.5, -(0.5**0.5), 0, 0, 0, 0, 0, 0, 0, -1, 0, 1]),
        ({"advantage": "group_mean"}, [1, -1, 0, 0, 0, 0, 0, 0, 0, -1, 0, 1]),
        # less the mean of the other one (n - 1 = 1), of the other two
        ({"advantage": "leave_one_out"}, [2, -2, 0, 0, 0, 0, 0, 0, 0, -1.5, 0, 1.5]),
        # each rollout without steps is one step: as group_std
        ({"advantage": "process"}, [0.5**0.5, -(0.5**0.5), 0, 0, 0, 0, 0, 0, 0, -1, 0, 1]),
        # 8 tokens: 3, 3, 1, 5, 0, 1, 1, 2: mean 2, mean square of deviations (1+1+1+9+4+1+1+0)/8 = 9/4
        ({"name": "reinforce_plus_plus", "kl_coef": 0.0}, [2 / 3, -2 / 3, 0, 0, 0, 0, 2, 0, 0, -4 / 3, -2 / 3, 0]),
        # 8 tokens of r - mean: 1, 1, -1, 0, -1, 0, 0, 1: mean 1/8, mean square 5/8
        (
            {"name": "reinforce_plus_plus_baseline", "kl_coef": 0.0},
            [(v - 1 / 8) / (5 / 8 - 1 / 64) ** 0.5 for v in (1, -1)]
            + [0] * 4
            + [(-1 / 8) / (5 / 8 - 1 / 64) ** 0.5, 0, 0]
            + [(v - 1 / 8) / (5 / 8 - 1 / 64) ** 0.5 for v in (-1, 0, 1)],
        ),
        # values 0, no discount: each token's advantage is the reward, as in reinforce_plus_plus
        (
            {"name": "ppo", "gae_lambda": 1.0, "kl_coef": 0.0},
            [2 / 3, -2 / 3, 0, 0, 0, 0, 2, 0, 0, -4 / 3, -2 / 3, 0],
        ),
    ],
)
def test_rollouts_without_a_reward_are_left_out_of_every_advantage_by_hand(
    keys: dict[str, object], expected: list[float]
) -> None:
    objective = Objective(AlgorithmConfig.model_validate(keys), max_tokens=4)
    values = [[0.0] * n for n in GAP_LENGTHS] if keys.get("name") == "ppo" else None
    found = credit(objective, gap_groups(), GAPS, values=values).advantages
    for advantage, length, wanted in zip(found, GAP_LENGTHS, expected, strict=True):
        row = advantage if isinstance(advantage, list) else [advantage] * length
        assert row == pytest.approx([wanted] * length, abs=2e-6)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # 6 rollouts with a reward and 8 tokens, in 3 groups with 3, 1 and 4 tokens
        ("rollout_mean", [1 / 12, 1 / 6, 0, 0, 0, 0, 1 / 6, 0, 0, 1 / 6, 1 / 12, 1 / 6]),
        ("token_mean", [1 / 8, 1 / 8, 0, 0, 0, 0, 1 / 8, 0, 0, 1 / 8, 1 / 8, 1 / 8]),
        ("rollout_sum", [1 / 24, 1 / 24, 0, 0, 0, 0, 1 / 24, 0, 0, 1 / 24, 1 / 24, 1 / 24]),
        ("group_token_mean", [1 / 9, 1 / 9, 0, 0, 0, 0, 1 / 3, 0, 0, 1 / 12, 1 / 12, 1 / 12]),
    ],
)
def test_rollouts_without_a_reward_are_in_no_denominator(aggregation: str, expected: list[float]) -> None:
    objective = Objective(AlgorithmConfig.model_validate({"aggregation": aggregation}), max_tokens=4)
    found = credit(objective, gap_groups(), GAPS)
    assert found.token_weights == pytest.approx(expected, rel=1e-12)
    assert found.is_trained == [reward is not None for reward in GAPS]
    # each update has denominators of its own: groups 1 and 2, groups 3 and 4
    halves = credit(objective, gap_groups(), GAPS, minibatches=[range(6), range(6, 12)]).token_weights
    first = {"rollout_mean": 1 / 4, "token_mean": 1 / 3, "rollout_sum": 1 / 8, "group_token_mean": 1 / 3}
    assert halves[0] == pytest.approx(first[aggregation])
    assert halves[2:6] == [0.0] * 4


def test_an_estimator_that_knows_nothing_of_missing_rewards_gets_the_mean_of_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from grpo_mega.algorithm import Estimates, advantage\n"
        "@advantage\n"
        "def less_the_mean(step):\n"
        "    rewards = step.reward_matrix\n"
        "    return Estimates((rewards - rewards.mean(1, keepdim=True) + 100).flatten().tolist())\n"
    )
    (tmp_path / "simple_advantage.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    objective = Objective(AlgorithmConfig(advantage="./simple_advantage.py:less_the_mean"), max_tokens=4)
    found = credit(objective, gap_groups(), GAPS).per_rollout
    assert found == [101.0, 99.0, 0.0, 0.0, 0.0, 0.0, 100.0, 0.0, 0.0, 99.0, 100.0, 101.0]


def test_a_group_with_fewer_than_two_rewards_is_degenerate() -> None:
    given = gap_groups()
    assert given.sampled().degenerate.tolist() == [False, True, True, False]
    dropped = credit(Objective(AlgorithmConfig(degenerate="drop"), max_tokens=4), given, GAPS)
    assert dropped.is_trained == [True, True, *[False] * 7, True, True, True]
    assert dropped.token_weights[6] == 0.0  # the only reward of its group
    assert dropped.token_weights[9] == pytest.approx(1 / 5)


def test_a_step_without_rewards_trains_nothing() -> None:
    given = make_groups([1, 2], [0.0, 0.0])
    for name in ("grpo", "rloo", "dr_grpo", "reinforce_plus_plus"):
        found = credit(Objective(AlgorithmConfig.model_validate({"name": name}), 4), given, [None, None])
        assert found.token_weights == [0.0, 0.0]
        assert found.is_trained == [False, False]
        assert {a for row in found.advantages for a in (row if isinstance(row, list) else [row])} == {0.0}


def test_the_overlong_penalty_and_the_kl_penalty_skip_rollouts_without_a_reward() -> None:
    keys = {"name": "rloo", "kl_coef": 0.5, "overlong_penalty": 1.0, "overlong_buffer_fraction": 0.5}
    objective = Objective(AlgorithmConfig.model_validate(keys), max_tokens=4)
    given = make_groups([1, 4, 4], [0.0] * 3, size=3)
    # rewards 2 - 0.5 * 1 and 3 - 1 (at the limit): 1.5 - 2 and 2 - 1.5
    found = credit(objective, given, [2.0, 3.0, None], kl=[[1.0], [0.0] * 4, [100.0] * 4])
    assert found.per_rollout == [-0.5, 0.5, 0.0]

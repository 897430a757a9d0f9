"""Metrics of a step, with hand-computed numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from grpo_mega.data.rollout_table import RolloutTable
from grpo_mega.data.row_plan import RowShape, plan_step
from grpo_mega.observe.metric_table import require_known
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.batch import TrainBatch, rows_of_plan
from grpo_mega.trainer.step_metrics import StepResult
from grpo_mega.types import Completion, Prompt, Reward, Rollout, StopReason, UpdateStats
from grpo_mega.weight_sync.sync import SyncReport
from tests.helpers.token_values import token_values


def make_rollout(
    sampler_log_probs: list[float],
    value: float = 0.0,
    *,
    num_prompt_tokens: int = 2,
    stop: StopReason = "eos",
    replica: int = 0,
    failures: tuple[str, ...] = (),
) -> Rollout:
    tokens = tuple(range(len(sampler_log_probs)))
    return Rollout(
        Prompt(0, "", (0,) * num_prompt_tokens, ""),
        Completion(tokens, tuple(sampler_log_probs), stop, 0, ""),
        Reward(value, {"exact": value, "format": 2 * value}, failures),
        replica,
    )


def make_stats(loss: float, ratio: float, learning_rate: float, **more: float) -> UpdateStats:
    return UpdateStats(
        grad_norm=10 * loss,
        learning_rate=learning_rate,
        sums={"loss": loss, "entropy": 2 * loss, "clip_fraction": loss / 4, **more},
        maxima={"ratio": ratio},
    )


ROLLOUTS = [
    make_rollout([-1.0, -2.0], 1.0, num_prompt_tokens=3),
    make_rollout([-1.0], 0.0, num_prompt_tokens=3, stop="length"),
    make_rollout([-0.5, -0.5, -0.5], 0.5, num_prompt_tokens=5, replica=2, failures=("exact",)),
    make_rollout([-1.0, -1.0], 0.5, num_prompt_tokens=5, replica=2),
]


def make_result(updates: list[UpdateStats]) -> StepResult:
    sync = SyncReport(
        seconds=0.5, verify_seconds=0.1, written_bytes=3_000_000_000, received_bytes=1_000_000_000, policy_digest=""
    )
    return result_of(ROLLOUTS, updates, sync)


def result_of(rollouts: list[Rollout], updates: list[UpdateStats], sync: SyncReport) -> StepResult:
    groups = SampledGroups.of(rollouts, 2)
    plan = plan_step(np.array([4, 3, 5, 4]), [range(4)], max_tokens=8, dp=2, shape=RowShape())
    nothing = token_values([])
    is_trained = np.array([True, True, False, True])
    batch = TrainBatch(
        rows_of_plan(plan, 0, groups.tokens, nothing, np.zeros(4), segment_multiple=1),
        plan,
        nothing,
        groups.table.reward,
        is_trained,
    )
    tokens, advantages = {"train/mismatch_max": 0.5}, np.array([1.0, -1.0, 0.5, -0.5])
    return StepResult(4, replace(groups, num_discarded=2), batch, nothing, advantages, updates, sync, 0.04, tokens)


def is_one(table: RolloutTable) -> NDArray[np.bool_]:
    return table.reward == 1


def test_all_metrics_of_a_step_by_hand() -> None:
    found = make_result([make_stats(0.2, 1.5, 1e-4, kl=0.1), make_stats(0.4, 1.25, 2e-4, kl=0.3)]).metrics(3, is_one)
    assert found == pytest.approx(
        {
            "reward/mean": 0.5,
            "reward/std": math.sqrt(0.125),
            "reward/accuracy": 0.25,
            "reward/failed_fraction": 0.25,
            "reward/dropped_fraction": 0.0,
            "reward/component/exact": 0.5,
            "reward/component/format": 1.0,
            "reward/p10": 0.15,
            "reward/p50": 0.5,
            "reward/p90": 0.85,
            "group/all_right_fraction": 0.0,
            "group/all_wrong_fraction": 0.5,
            "group/reward_std": math.sqrt(0.5) / 2,
            "group/pass_at_1": 0.25,
            "group/pass_at_2": 0.5,
            "group/advantage_std": math.sqrt(0.625),
            "group/advantage_max": 1.0,
            "rollout/length_p10": 1.3,
            "rollout/length_p50": 2.0,
            "rollout/length_p90": 2.7,
            "group/degenerate_fraction": 0.75,
            "group/discarded": 2.0,
            "rollout/length_mean": 2.0,
            "rollout/length_max": 3.0,
            "rollout/prompt_length_mean": 4.0,
            "rollout/truncated_fraction": 0.25,
            "rollout/tokens": 8.0,
            "rollout/turns_mean": 1.0,
            "rollout/result_tokens": 0.0,
            "rollout/tokens_per_replica/0": 3.0,
            "rollout/tokens_per_replica/1": 0.0,
            "rollout/tokens_per_replica/2": 5.0,
            "train/loss": 0.3,
            "train/entropy": 0.6,
            "train/clip_fraction": 0.075,
            "train/kl": 0.2,
            "train/kl_coef": 0.04,
            "train/grad_norm": 3.0,
            "train/learning_rate": 2e-4,
            "train/ratio_max": 1.5,
            "train/updates": 2.0,
            "train/mismatch_max": 0.5,
            "train/padding_fraction": 1 - 16 / 16,
            "train/imbalance": 1.0,
            "train/num_loss_tokens": 5.0,
            "train/unused_rollouts": 1.0,
            "time/checkpoint_wait_seconds": 0.0,
            "sync/bytes": 3e9,
            "sync/received_bytes": 1e9,
            "sync/verify_seconds": 0.1,
            "sync/gb_per_second": 6.0,
        },
        rel=1e-12,
    )
    require_known(found)


def with_rewards(found: StepResult, rewards: list[Reward], sets: str) -> StepResult:
    rollouts = [
        replace(r, reward=reward, prompt=Prompt(i // 2, "", r.prompt.token_ids, "", name))
        for i, (r, reward, name) in enumerate(zip(ROLLOUTS, rewards, sets, strict=True))
    ]
    return result_of(rollouts, found.updates, found.sync)


def test_rollouts_without_a_reward_are_in_no_mean_of_rewards() -> None:
    rewards = [
        Reward(1.0, {"exact": 1.0, "judge": 0.5}),
        Reward(None, {"exact": 1.0}, ("judge",)),
        Reward(0.0, {"exact": 0.0, "judge": 0.25}),
        Reward(None, {"exact": 0.0}, ("judge",)),
    ]
    given = with_rewards(make_result([make_stats(0.2, 1.5, 1e-4)]), rewards, "aabb")
    found = given.metrics(3, is_one)
    assert {name: value for name, value in found.items() if name.startswith(("reward/", "set/", "group/de"))} == {
        "reward/mean": 0.5,
        "reward/std": 0.5,
        "reward/accuracy": 0.5,
        "reward/failed_fraction": 0.5,
        "reward/dropped_fraction": 0.5,
        "reward/component/exact": 0.5,
        "reward/component/judge": 0.375,
        "reward/p10": pytest.approx(0.1),
        "reward/p50": 0.5,
        "reward/p90": pytest.approx(0.9),
        "group/degenerate_fraction": 1.0,  # both groups have one reward, and two were replaced
    }
    found = with_rewards(given, [Reward(None)] * 4, "aabb").metrics(3, is_one)
    assert all(math.isnan(found[f"reward/{name}"]) for name in ("mean", "std", "accuracy"))
    require_known(found)


def test_each_of_several_sets_has_its_own_metrics_by_hand() -> None:
    rewards = [
        Reward(1.0, {"gsm8k": 1.0}),
        Reward(None, {}, ("gsm8k",)),
        Reward(0.25, {"exact": 0.25}),
        Reward(0.5, {"exact": 0.5}),
    ]
    given = with_rewards(make_result([make_stats(0.2, 1.5, 1e-4)]), rewards, "aabb")
    found = given.metrics(3, is_one, ["a", "b", "c"])
    assert {name: value for name, value in found.items() if name.startswith(("set/", "reward/component"))} == {
        "reward/component/gsm8k": 1.0,
        "reward/component/exact": 0.375,
        "set/a/rollouts": 2.0,
        "set/a/reward_mean": 1.0,
        "set/a/accuracy": 1.0,
        "set/a/length_mean": 1.5,
        "set/a/failed_fraction": 0.5,
        **{f"set/a/reward_p{p}": 1.0 for p in (10, 50, 90)},
        **{f"set/a/length_p{p}": pytest.approx(1 + p / 100) for p in (10, 50, 90)},
        **{f"set/b/reward_p{p}": pytest.approx(0.25 + 0.25 * p / 100) for p in (10, 50, 90)},
        **{f"set/b/length_p{p}": pytest.approx(2 + p / 100) for p in (10, 50, 90)},
        "set/b/rollouts": 2.0,
        "set/b/reward_mean": 0.375,
        "set/b/accuracy": 0.0,
        "set/b/length_mean": 2.5,
        "set/b/failed_fraction": 0.0,
    }
    require_known(found)


def test_the_metrics_of_a_critic_by_hand() -> None:
    updates = [
        UpdateStats(g, r, {"loss": v, "clip_fraction": c}, {}) for g, r, v, c in ((2, 0.1, 3, 0), (4, 0.2, 5, 1))
    ]
    plain = make_result([make_stats(0.2, 1.5, 1e-4)])
    assert not any(name.startswith(("critic/", "memory/")) for name in plain.metrics(3, is_one))
    found = replace(plain, critic_updates=updates, state_bytes={"critic_params": 7}).metrics(3, is_one)
    require_known(found)
    own = {name: value for name, value in found.items() if name.startswith(("critic/", "memory/"))}
    assert own == pytest.approx(
        {
            "critic/loss": 4.0,
            "critic/clip_fraction": 0.5,
            "critic/grad_norm": 3.0,
            "critic/learning_rate": 0.2,
            "memory/critic_params_bytes": 7.0,
        }
    )


def test_fp8_scales_are_reported_where_there_are_any() -> None:
    updates = [make_stats(0.2, 1.5, 1e-4, fp8_cut=cut, fp8_zero=cut / 2) for cut in (0.25, 0.75)]
    for update, amax in zip(updates, (3.0, 2.0), strict=True):
        update.maxima["fp8_amax"] = amax
    found = make_result(updates).metrics(3, is_one)
    assert (found["train/fp8_cut_fraction"], found["train/fp8_zero_fraction"], found["train/fp8_amax"]) == (
        0.5,
        0.25,
        3.0,
    )
    require_known(found)
    assert not [name for name in make_result([make_stats(0.2, 1.5, 1e-4)]).metrics(3, is_one) if "fp8" in name]


def test_the_auxiliary_loss_is_reported_where_there_is_one() -> None:
    found = make_result([make_stats(0.2, 1.5, 1e-4, aux_loss=loss) for loss in (1.0, 1.5)]).metrics(3, is_one)
    assert found["train/aux_loss"] == 1.25
    require_known(found)
    assert "train/aux_loss" not in make_result([make_stats(0.2, 1.5, 1e-4)]).metrics(3, is_one)


def test_a_loss_without_a_reference_reports_no_kl() -> None:
    assert "train/kl" not in make_result([make_stats(0.2, 1.5, 1e-4)]).metrics(3, is_one)

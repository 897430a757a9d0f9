"""The properties that are derived from several keys of the config."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.config.rollout_sections import EvaluationConfig
from grpo_mega.config.schema import Config


def config_of(**sections: dict[str, Any]) -> Config:
    required: dict[str, Any] = {
        "model": {"path": "unused"},
        "data": {"train": "unused", "max_prompt_tokens": 64},
        "reward": {"terms": [{"name": "exact"}]},
        "train": {"steps": 1},
    }
    return Config.model_validate(required | sections)


@pytest.mark.parametrize(("evaluated", "longest"), [(None, 96), (16, 96), (40, 104)])
def test_the_longest_rollout_is_that_of_training_or_of_evaluation(evaluated: int | None, longest: int) -> None:
    config = config_of(sampling={"max_tokens": 32}, evaluation={"max_tokens": evaluated})
    assert config.longest_rollout == longest
    assert config.longest_training_rollout == 96


def test_a_reference_is_needed_for_a_kl_penalty_in_the_loss_and_in_the_reward() -> None:
    assert AlgorithmConfig().needs_reference
    assert AlgorithmConfig(name="rloo").needs_reference
    assert not AlgorithmConfig(kl_coef=0.0).needs_reference


def test_a_critic_is_needed_for_generalized_advantage_estimation_only() -> None:
    assert AlgorithmConfig(name="ppo").needs_critic
    assert not AlgorithmConfig().needs_critic


@pytest.mark.parametrize(("every", "due"), [(None, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4]), (3, [3]), (6, [])])
def test_the_loop_evaluates_every_so_many_steps_but_not_after_the_last_one(every: int | None, due: list[int]) -> None:
    evaluation = EvaluationConfig(every=every)
    assert [step for step in range(1, 7) if evaluation.is_due(step, 6)] == due

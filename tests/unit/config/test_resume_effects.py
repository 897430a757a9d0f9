"""Every config key says what its change means for a run that continues."""

from __future__ import annotations

import pytest

from grpo_mega.config.load import known_keys
from grpo_mega.config.resume_effects import EFFECTS, UNSET, default_value, resume_effect
from grpo_mega.config.schema import Config


def test_every_key_has_a_mark_and_every_mark_a_key() -> None:
    keys = known_keys()
    sections = set(Config.model_fields)
    assert [key for key in keys if key not in sections and resume_effect(key) is None] == []
    assert [key for key in EFFECTS if key not in keys] == []


@pytest.mark.parametrize(
    ("effect", "keys"),
    [
        (
            "changes_speed",
            "train.max_tokens_per_microbatch engine.max_num_seqs engine.kv_cache_tokens reward.workers "
            "reward.timeout_seconds weight_sync.bucket_bytes weight_sync.transport evaluation.every "
            "guard.timeout_seconds train.steps checkpoint.every parallel.tp run.world_size",
        ),
        (
            "changes_future",
            "optimizer.lr algorithm.kl_coef guard.max_mismatch reward.terms sampling.temperature "
            "parallel.megatron.some_field",
        ),
        ("frozen", "run.seed model.path data.train data.prompts_per_step precision.dtype algorithm.advantage"),
    ],
)
def test_the_marks_of_keys_that_operators_change(effect: str, keys: str) -> None:
    assert {key: resume_effect(key) for key in keys.split()} == dict.fromkeys(keys.split(), effect)


@pytest.mark.parametrize(
    ("key", "config", "value"),
    [
        ("optimizer.eps", {}, 1e-8),
        ("data.eval", {}, None),
        ("model.base.architecture.head_dim", {}, 32),
        ("algorithm.kl_coef", {}, 0.04),
        ("algorithm.kl_coef", {"algorithm": {"name": "ppo"}}, 0.02),
        ("train.steps", {}, UNSET),
        ("engine.new", {}, UNSET),
        ("nothing.new", {}, UNSET),
    ],
)
def test_the_default_of_a_key_that_a_stored_config_does_not_hold(
    key: str, config: dict[str, object], value: object
) -> None:
    assert default_value(key, config) == value

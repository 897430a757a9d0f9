"""Rules for supervised fine-tuning (`train.objective: sft`): keys that one of the two objectives does not read."""

from __future__ import annotations

from typing import Any

from grpo_mega.config.schema import Config
from grpo_mega.config.section import Section
from grpo_mega.types import UserError

_READ_BY_POLICY = ("aux_loss_coef", "router_bias_update_rate")
"""Keys of `algorithm` that supervised fine-tuning reads too."""


def check_sft(config: Config) -> None:
    """Raise UserError for the first key that does nothing with this `train.objective`."""
    if not config.is_sft:
        _check_rl(config)
        return
    for section, keys, why in (
        ("train", ("epochs_per_rollout",), "there are no rollouts"),
        (
            "algorithm",
            [key for key in type(config.algorithm).model_fields if key not in _READ_BY_POLICY],
            "the loss is the likelihood of the answers",
        ),
        (
            "sampling",
            ("group_size", "temperature"),
            "no training rollouts are sampled, and the loss has temperature 1; see evaluation.temperature",
        ),
        ("reward", ("shuffle",), "no training rollouts are scored"),
    ):
        for key in keys:
            _require_default(f"{section}.{key}", getattr(config, section), "sft", why)
    for position, source in enumerate(config.data.train_sets):
        for key in ("min_prompt_tokens", "max_prompt_tokens", "answer_key"):
            _require_default(f"data.train[{position}].{key}", source, "sft", "a row is a whole example")
    if config.data.template == "plain" and config.data.messages_key is not None:
        raise UserError(
            f"data.messages_key={config.data.messages_key} is not supported with data.template=plain, which has no "
            "roles",
            remedy="set data.template=chat, or use rows with a prompt and a completion",
        )


def _check_rl(config: Config) -> None:
    why = "the answers are sampled"
    for key in ("messages_key", "completion_key", "max_example_tokens"):
        _require_default(f"data.{key}", config.data, "rl", why)
    if config.data.overlong == "truncate":
        raise UserError(
            "data.overlong=truncate is not supported with train.objective=rl: a prompt without its end asks something "
            "else",
            remedy="use skip or error",
        )


def _require_default(key: str, section: Section, objective: str, why: str) -> None:
    """Raise UserError if the last part of `key` has another value in `section` than its default."""
    name = key.rpartition(".")[2]
    value: Any = getattr(section, name)
    if value != type(section).model_fields[name].default:
        raise UserError(
            f"{key}={value} does nothing with train.objective={objective}: {why}", remedy=f"leave {key} out"
        )

"""Rules for `guard.rules`: an action that would do nothing in this run is an error.

Asserted by tests/unit/config/test_guard_section.py.
"""

from __future__ import annotations

from grpo_mega.config.schema import Config
from grpo_mega.types import UserError

_ON_ROLLOUTS = ("kl", "mismatch", "reward_collapse", "truncation", "degenerate")


def check_guard(config: Config) -> None:
    """Raise UserError for the first rule whose action would do nothing."""
    actions = config.guard.rules.actions
    for rule, action in actions.items():
        key = f"guard.rules.{rule}={action}"
        if config.is_sft and rule in _ON_ROLLOUTS:
            raise UserError(
                f"{key} has no effect with train.objective=sft, which has no training rollouts",
                remedy=f"remove it (guard.rules.{rule}=off)",
            )
        if config.is_sft and action == "quarantine":
            raise UserError(
                f"{key} is not supported with train.objective=sft, which has no rollouts to write",
                remedy=f"use guard.rules.{rule}=skip_update",
            )
    if "kl" in actions and not config.needs_reference:
        raise UserError(
            f"guard.rules.kl={actions['kl']} needs the KL divergence from a reference, and algorithm.kl_coef=0",
            remedy="set algorithm.kl_coef, or guard.rules.kl=off",
        )

"""Rules for `train.max_staleness`: what sampling during training needs, and what it does not work with.

Asserted by tests/unit/config/test_async_rules.py.
"""

from __future__ import annotations

from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.config.schema import Config
from grpo_mega.types import UserError

Combination = tuple[bool, str, str, str]
"""A combination with `train.max_staleness`: True if it is set, the other key, why it is not supported, the remedy."""


def check_asynchrony(config: Config) -> None:
    """Raise UserError for the first broken rule."""
    if not config.is_asynchronous:
        if config.train.slice_tokens is not None:
            raise UserError(
                f"train.slice_tokens={config.train.slice_tokens} does nothing with train.max_staleness=0",
                remedy="leave it out; sampling.partial.slice_tokens is the key of partial rollouts",
            )
        return
    train = config.train
    key, synchronous = f"train.max_staleness={train.max_staleness}", "or train.max_staleness=0"
    for is_set, other, why, remedy in (*_other_sections(config), *_algorithm(config.algorithm)):
        if is_set:
            raise UserError(f"{key} is not supported with {other}: {why}", remedy=f"{remedy}, {synchronous}")
    if train.max_staleness < train.updates_per_step:
        raise UserError(
            f"{key} is less than the updates of a step, train.epochs_per_rollout x train.minibatches_per_epoch = "
            f"{train.updates_per_step}: every rollout that was sampled during training would be dropped",
            remedy=f"use {train.updates_per_step} or more, {synchronous}",
        )


def _other_sections(config: Config) -> tuple[Combination, ...]:
    return (
        (
            config.is_sft,
            "train.objective=sft",
            "it samples no training rollouts",
            "set train.objective=rl",
        ),
        (
            config.engine.placement == "colocated",
            "engine.placement=colocated",
            "engine and policy use the same devices in alternation, so no rollout can be sampled while the policy "
            "trains",
            "set engine.placement=server (docs/servers.md)",
        ),
        (
            config.sampling.partial is not None,
            "sampling.partial",
            "servers continue all open rollouts after each weight sync anyway",
            "remove sampling.partial",
        ),
        (
            config.sampling.prompts_per_wave is not None,
            f"sampling.prompts_per_wave={config.sampling.prompts_per_wave}",
            "all open rollouts of a server are continued together",
            "remove sampling.prompts_per_wave; engine.max_num_seqs limits the rollouts that run together",
        ),
        (
            "rollback" in config.guard.rules.actions.values(),
            "a rule of guard.rules with the action rollback",
            "a rollback continues with prompts of later steps, and the servers hold rollouts of earlier ones",
            "use skip_update, quarantine or stop",
        ),
    )


def _algorithm(algorithm: AlgorithmConfig) -> tuple[Combination, ...]:
    return (
        (
            algorithm.old_log_probs == "sampler",
            "algorithm.old_log_probs=sampler",
            "its ratio would be clipped around the weights that sampled each token, so that tokens of older weights "
            "can begin outside of the clip range and get no gradient",
            "set algorithm.old_log_probs=policy",
        ),
        (
            algorithm.surrogate == "policy_gradient" and algorithm.correction in (None, "token_masked"),
            f"algorithm.name={algorithm.name}: algorithm.surrogate=policy_gradient with "
            f"algorithm.correction={algorithm.correction or 'null'}",
            "this gradient has no ratio and is right only for rollouts of the present weights, unless each token has "
            "an importance weight",
            "set algorithm.correction=token_truncated or sequence_truncated",
        ),
        (
            algorithm.correction is None,
            "algorithm.correction=null",
            "the weights that sampled a token are older than the policy, and nothing would weight or mask the tokens "
            "whose probability has changed since then",
            "set algorithm.correction=token_truncated",
        ),
    )

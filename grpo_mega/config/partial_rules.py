"""Rules for `sampling.partial`: what it does not work with, and values that would do nothing.

Asserted by tests/unit/config/test_partial_rules.py.
"""

from __future__ import annotations

from grpo_mega.config.schema import Config
from grpo_mega.types import UserError


def check_partial(config: Config) -> None:
    """Raise UserError for the first broken rule."""
    sampling, train = config.sampling, config.train
    if sampling.partial is None:
        return
    unsupported = (
        (
            config.engine.placement == "server",
            "engine.placement=server",
            "engine servers carry rollouts from one step to the next with train.max_staleness",
            "set train.max_staleness and remove sampling.partial, or set engine.placement=colocated",
        ),
        (
            sampling.prompts_per_wave is not None,
            f"sampling.prompts_per_wave={sampling.prompts_per_wave}",
            "all open rollouts of a replica are continued together",
            "remove sampling.prompts_per_wave; engine.max_num_seqs limits the rollouts that run together",
        ),
        (
            config.algorithm.old_log_probs == "sampler",
            "algorithm.old_log_probs=sampler",
            "its ratio would be clipped around the weights that sampled each token, so that tokens of older weights "
            "can begin outside of the clip range and get no gradient",
            "set algorithm.old_log_probs=policy",
        ),
        (
            "rollback" in config.guard.rules.actions.values(),
            "a rule of guard.rules with the action rollback",
            "a rollback continues with prompts of later steps, and carried rollouts have those of earlier ones",
            "use skip_update, quarantine or stop",
        ),
        (
            config.is_sft,
            "train.objective=sft",
            "it samples no training rollouts",
            "remove sampling.partial",
        ),
    )
    for is_set, key, why, remedy in unsupported:
        if is_set:
            raise UserError(f"sampling.partial is not supported with {key}: {why}", remedy=remedy)
    if sampling.slice_tokens >= sampling.max_tokens:
        raise UserError(
            f"sampling.partial.slice_tokens={sampling.slice_tokens} must be less than "
            f"sampling.max_tokens={sampling.max_tokens}: every rollout would be complete after one slice, and none "
            "would be carried over",
            remedy=f"use {max(1, sampling.max_tokens // 4)} or fewer, or remove sampling.partial",
        )
    if sampling.partial.max_staleness < train.updates_per_step:
        raise UserError(
            f"sampling.partial.max_staleness={sampling.partial.max_staleness} is less than the updates of a step, "
            f"train.epochs_per_rollout x train.minibatches_per_epoch = {train.updates_per_step}: every carried group "
            "would be dropped",
            remedy=f"use {train.updates_per_step} or more; {4 * train.updates_per_step} lets a group take five steps",
        )

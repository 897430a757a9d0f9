"""Rules between the keys of `algorithm`: keys that a choice needs must be set, keys that it does not read must not."""

from __future__ import annotations

from grpo_mega.config.algorithm_parts import part_keys
from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.types import UserError

_SURROGATE_KEYS = ("clip_low", "clip_high", "dual_clip", "gate_positive", "gate_negative")
_ADVANTAGE_KEYS = ("gamma", "gae_lambda")


def check_algorithm(algorithm: AlgorithmConfig) -> None:
    """Raise UserError for the first broken rule."""
    for rule in (
        _surrogate,
        _advantage,
        _critic,
        _aggregation_length,
        _old_log_probs,
        _correction,
        _overlong,
        _reference,
        _degenerate,
        _process,
    ):
        rule(algorithm)


def _surrogate(algorithm: AlgorithmConfig) -> None:
    required, optional = part_keys("surrogate", algorithm.surrogate, type(algorithm).model_fields)
    for key in _SURROGATE_KEYS:
        value = getattr(algorithm, key)
        if value is not None and key not in (*required, *optional):
            raise UserError(
                f"algorithm.{key}={value} does nothing with algorithm.surrogate={algorithm.surrogate} "
                f"(algorithm.name={algorithm.name})",
                remedy=f"set algorithm.{key}=null",
            )
    _require(algorithm, "surrogate", required)


def _advantage(algorithm: AlgorithmConfig) -> None:
    required, optional = part_keys("advantage", algorithm.advantage, type(algorithm).model_fields)
    for key in _ADVANTAGE_KEYS:
        value = getattr(algorithm, key)
        if value is not None and key not in (*required, *optional):
            raise UserError(
                f"algorithm.{key}={value} does nothing with algorithm.advantage={algorithm.advantage}",
                remedy="leave it out, or use advantage=gae",
            )
    _require(algorithm, "advantage", required)


def _require(algorithm: AlgorithmConfig, kind: str, keys: tuple[str, ...]) -> None:
    for key in keys:
        if getattr(algorithm, key) is None:
            usual = {"gamma": " (1.0 is usual)", "gae_lambda": " (0.95 is usual)"}.get(key, "")
            raise UserError(
                f"algorithm.{key}=null, but algorithm.{kind}={getattr(algorithm, kind)} needs a value",
                remedy=f"set it{usual}, or use another {kind}",
            )


def _critic(algorithm: AlgorithmConfig) -> None:
    for key in ("value_clip", "critic_lr_factor"):
        value = getattr(algorithm, key)
        if not algorithm.needs_critic and value != type(algorithm).model_fields[key].default:
            raise UserError(
                f"algorithm.{key}={value} does nothing with algorithm.advantage={algorithm.advantage}, which has no "
                "critic",
                remedy="leave it out, or use advantage=gae",
            )


def _aggregation_length(algorithm: AlgorithmConfig) -> None:
    if algorithm.aggregation_length is not None and algorithm.aggregation != "rollout_sum":
        raise UserError(
            f"algorithm.aggregation_length={algorithm.aggregation_length} does nothing with "
            f"algorithm.aggregation={algorithm.aggregation}",
            remedy="leave it out, or use aggregation=rollout_sum",
        )


def _old_log_probs(algorithm: AlgorithmConfig) -> None:
    """Check what `algorithm.old_log_probs=sampler` needs: a surrogate with a ratio, and a bound on the mismatch."""
    if algorithm.old_log_probs == "policy":
        return
    chosen = "algorithm.old_log_probs=sampler"
    if algorithm.surrogate == "policy_gradient":
        raise UserError(
            f"{chosen} with algorithm.surrogate=policy_gradient: it has no ratio, so the mismatch of policy and engine "
            "would not be corrected",
            remedy="use surrogate=clipped_weight, or old_log_probs=policy",
        )
    if algorithm.kl_in == "reward" and algorithm.kl_coef > 0:
        raise UserError(
            f"{chosen} with algorithm.kl_in=reward: the penalty is computed from the policy's log-probs before the "
            "update, which need the separate pass",
            remedy="use kl_in=loss, kl_coef=0, or old_log_probs=policy",
        )
    if algorithm.correction in ("token_truncated", "sequence_truncated"):
        raise UserError(
            f"{chosen} with algorithm.correction={algorithm.correction}: the ratio contains policy / engine already, "
            "and this correction would multiply by it again",
            remedy="leave correction out (token_masked), or use old_log_probs=policy",
        )
    if algorithm.correction is None:
        raise UserError(
            f"{chosen} with algorithm.correction=null: the ratio contains policy / engine, which nothing bounds for "
            "tokens with a negative advantage",
            remedy="leave correction out (token_masked), or use old_log_probs=policy",
        )


def _correction(algorithm: AlgorithmConfig) -> None:
    form = algorithm.correction
    reads = {None: (), "token_masked": ("correction_low", "correction_high")}.get(form, ("correction_high",))
    for key in ("correction_low", "correction_high"):
        value = getattr(algorithm, key)
        if value is not None and key not in reads:
            raise UserError(
                f"algorithm.{key}={value} does nothing with algorithm.correction={form or 'null'}; leave it out"
                + ("" if form else ", or set algorithm.correction")
            )
        if value is None and key in reads:
            raise UserError(
                f"algorithm.{key}=null, but algorithm.correction={form} needs it", remedy="leave it out or set it"
            )


def _overlong(algorithm: AlgorithmConfig) -> None:
    default = type(algorithm).model_fields["overlong_penalty"].default
    if algorithm.overlong_penalty != default and algorithm.overlong_buffer_fraction is None:
        raise UserError(
            f"algorithm.overlong_penalty={algorithm.overlong_penalty} does nothing without "
            "algorithm.overlong_buffer_fraction",
            remedy="set it",
        )


def _reference(algorithm: AlgorithmConfig) -> None:
    for key, value in (("kl_target", algorithm.kl_target), ("ref_update_every", algorithm.ref_update_every)):
        if value and algorithm.kl_coef == 0:
            raise UserError(
                f"algorithm.{key}={value} does nothing with algorithm.kl_coef=0 (algorithm.name={algorithm.name})",
                remedy="set kl_coef, or leave it out",
            )
    if algorithm.kl_target is not None and algorithm.kl_estimator == "k1":
        raise UserError(
            f"algorithm.kl_target={algorithm.kl_target} with algorithm.kl_estimator=k1: its mean may be negative",
            remedy="use kl_estimator=k3",
        )


def _degenerate(algorithm: AlgorithmConfig) -> None:
    if (algorithm.refill_rounds is not None) != (algorithm.degenerate == "refill"):
        rounds = "null" if algorithm.refill_rounds is None else algorithm.refill_rounds
        raise UserError(
            f"algorithm.refill_rounds={rounds} with algorithm.degenerate={algorithm.degenerate}: refill needs a number "
            "of rounds, nothing else reads it",
            remedy="set it or leave it out",
        )
    if algorithm.degenerate != "keep" and algorithm.advantage in ("batch", "gae"):
        raise UserError(
            f"algorithm.degenerate={algorithm.degenerate} with algorithm.advantage={algorithm.advantage}: groups of "
            "equal rewards contribute to the gradient when advantages are not relative to the group",
            remedy="use degenerate=keep",
        )


def _process(algorithm: AlgorithmConfig) -> None:
    if algorithm.advantage != "process":
        return
    if algorithm.kl_in == "reward" and algorithm.kl_coef > 0:
        raise UserError(
            "algorithm.kl_in=reward with algorithm.advantage=process: its rewards are those of steps, not of tokens",
            remedy="use kl_in=loss",
        )
    if algorithm.overlong_buffer_fraction is not None:
        raise UserError(
            f"algorithm.overlong_buffer_fraction={algorithm.overlong_buffer_fraction} with "
            "algorithm.advantage=process: the penalty is of whole rollouts",
            remedy="set algorithm.overlong_buffer_fraction=null",
        )

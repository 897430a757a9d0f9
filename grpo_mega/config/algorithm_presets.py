"""Default values of the `algorithm` keys for each `algorithm.name`.

A name lists only the keys in which it differs from `grpo`, whose defaults are in algorithm_section.py. Keys that the
user sets take precedence. Values are those of the papers where a paper states one; docs/algorithms.md lists the papers
and the values that they leave open. Asserted by tests/unit/algorithm/test_algorithms.py: each name gives the loss of
its paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

AlgorithmName = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "gmpo",
    "sapo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "ppo",
]

ALGORITHM_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage": "group_mean", "aggregation": "rollout_sum", "kl_coef": 0.0},
    "dapo": {
        "clip_high": 0.28,
        "aggregation": "token_mean",
        "kl_coef": 0.0,
        "overlong_buffer_fraction": 0.2,
        "degenerate": "refill",
    },
    "gspo": {"surrogate": "clipped_sequence_ratio", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},
    "cispo": {
        "surrogate": "clipped_weight",
        "clip_low": None,
        "clip_high": 4.0,
        "aggregation": "group_token_mean",
        "kl_coef": 0.0,
    },
    "gmpo": {"surrogate": "geometric_mean", "clip_low": 0.4, "clip_high": 0.4, "kl_coef": 0.0},
    "sapo": {
        "surrogate": "soft_gate",
        "clip_low": None,
        "clip_high": None,
        "gate_positive": 1.0,
        "gate_negative": 1.05,
        "kl_coef": 0.0,
    },
    "rloo": {
        "surrogate": "policy_gradient",
        "clip_low": None,
        "clip_high": None,
        "advantage": "leave_one_out",
        "aggregation": "rollout_sum",
        "aggregation_length": 1.0,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
    "reinforce_plus_plus": {
        "advantage": "batch",
        "aggregation": "token_mean",
        "kl_coef": 0.001,
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
    "reinforce_plus_plus_baseline": {
        "advantage": "group_batch",
        "aggregation": "token_mean",
        "kl_coef": 0.001,
        "kl_estimator": "k2",
    },
    "ppo": {
        "advantage": "gae",
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "value_clip": 0.2,
        "aggregation": "token_mean",
        "kl_coef": 0.02,
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
}

CORRECTION_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "token_truncated": {"correction_high": 2.0},
    "sequence_truncated": {"correction_high": 2.0},
    "token_masked": {"correction_low": 0.5, "correction_high": 5.0},
}
"""Defaults of the bounds for each `algorithm.correction`."""

REFILL_ROUNDS = 8
"""Default of `algorithm.refill_rounds` with `algorithm.degenerate=refill`."""


def settings_before_presets(name: str, section: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {key: (value, default of the algorithm)} for keys of a section that change a default of `name`."""
    defaults = ALGORITHM_DEFAULTS.get(name, {})
    return {key: (section[key], default) for key, default in defaults.items() if section.get(key, default) != default}


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `algorithm` section with the defaults of its choices; keys that are set keep their value."""
    found = {**ALGORITHM_DEFAULTS.get(str(values.get("name", "grpo")), {}), **values}
    if found.get("old_log_probs") == "sampler":
        found = {"correction": "token_masked", **found}
    found = {**CORRECTION_DEFAULTS.get(str(found.get("correction")), {}), **found}
    return {"refill_rounds": REFILL_ROUNDS, **found} if found.get("degenerate") == "refill" else found

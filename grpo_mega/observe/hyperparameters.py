"""Hyperparameters of a run and the metrics they are compared by, for TensorBoard's tab "HParams".

Asserted by tests/unit/observe/test_tensorboard.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_SECTIONS = ("algorithm", "optimizer", "sampling", "train", "parallel", "precision")
_KEYS = ("run.seed", "run.world_size", "data.prompts_per_step", "engine.kind", "model.path", "model.base.task")
COMPARED = (
    *("eval/accuracy", "eval/greedy_accuracy", "eval/reward_mean", "reward/mean", "reward/accuracy"),
    *("train/loss", "train/perplexity", "train/kl", "train/entropy", "train/mismatch_kl"),
    *("rollout/length_mean", "throughput/tokens_per_second", "time/step_seconds"),
)
"""Metrics whose last value TensorBoard shows beside the hyperparameters."""


def hyperparameters(config: Mapping[str, Any]) -> dict[str, float | str]:
    """Return {`section.key`: value} of the config keys that results depend on.

    A list is text. A key without a value has no entry.

    Args:
        config: the resolved config as nested plain values.
    """
    found: dict[str, float | str] = {}
    for key, value in _leaves(config):
        if value is not None and (key.partition(".")[0] in _SECTIONS or key in _KEYS):
            found[key] = value if isinstance(value, int | float) else str(value)
    return found


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

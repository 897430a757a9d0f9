"""Marks of config keys: the effect of a changed value on a run that continues; and the defaults of newer keys.

- `frozen`: the run's past would not fit: its model, its prompts, its random numbers, the state in its checkpoints.
- `changes_speed`: no result changes, except for rounding where the layout or the packing changes.
- `changes_future`: the steps so far stay as they are, and later steps have other results.

A key that is not in the table has the mark of its section. tests/unit/config/test_resume_effects.py checks that every
key has a mark; docs/reference/config.md shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grpo_mega.config.algorithm_presets import with_defaults
from grpo_mega.config.policy_sections import OptimizerConfig
from grpo_mega.config.schema import Config

ResumeEffect = Literal["frozen", "changes_speed", "changes_future"]
UNSET = object()
"""Stands for a key that has no value and no default."""

_MARKS: Mapping[ResumeEffect, tuple[str, ...]] = {
    "frozen": (
        "run.seed",
        "model",
        "data",
        "engine.kind",
        "sampling.partial",  # the checkpoint holds carried rollouts
        "environment",
        "train.objective",
        "train.max_staleness",  # the checkpoint holds carried rollouts
        "algorithm.name",
        "algorithm.advantage",  # gae: the checkpoint holds a critic
        "algorithm.ref_update_every",  # the checkpoint holds the reference
        "optimizer.name",  # the checkpoint holds its moments
        "precision",
    ),
    "changes_speed": (
        "run.dir",
        "run.world_size",
        "run.deterministic",
        "run.overwrite",
        "model.base.cache_dir",
        "parallel",
        "engine.placement",
        "engine.urls",
        "engine.spare_urls",
        "engine.tp",
        "engine.dp",
        "engine.ep",
        "engine.max_num_seqs",
        "engine.kv_cache_tokens",
        "engine.memory_share",
        "reward.workers",
        "reward.timeout_seconds",
        "environment.workers",
        "environment.timeout_seconds",
        "optimizer.host_fraction",
        "train.steps",
        "train.slice_tokens",
        "train.max_tokens_per_microbatch",
        "evaluation.every",
        "weight_sync",
        "checkpoint",
        "observe",
        "guard.timeout_seconds",
        "guard.phase_limits",
    ),
    "changes_future": (
        "policy",
        "parallel.megatron",
        "engine.fp8",
        "engine.args",
        "sampling",
        "reward",
        "environment.args",
        "environment.max_turns",
        "environment.stop",
        "algorithm",
        "optimizer",
        "train",
        "evaluation",
        "guard",
    ),
}
EFFECTS: Mapping[str, ResumeEffect] = {key: mark for mark, keys in _MARKS.items() for key in keys}
"""Key or section -> mark."""


def resume_effect(key: str) -> ResumeEffect | None:
    """Return the mark of a key: its own, or that of the nearest section. None: it has none."""
    while key:
        if key in EFFECTS:
            return EFFECTS[key]
        key = key.rpartition(".")[0]
    return None


def effect_of_change(key: str, config: Mapping[str, Any]) -> ResumeEffect:
    """Return the effect of another value of `key`, under the config of the command, nested plain values.

    It is the key's mark, except that a longer run changes a schedule of learning rates that ends with the run.
    """
    if key == "train.steps" and OptimizerConfig.model_validate(config.get("optimizer") or {}).depends_on_run_length:
        return "changes_future"
    return resume_effect(key) or "frozen"


def default_value(key: str, config: Mapping[str, Any]) -> Any:
    """Return the default of a key that `config`, nested plain values, does not hold; UNSET if there is none.

    A run folder that was made before the key existed was run with this value.
    """
    *sections, name = key.split(".")
    model: type[BaseModel] | None = Config
    for section in sections:
        model = _section_of(model.model_fields.get(section)) if model is not None else None
    field = model.model_fields.get(name) if model is not None else None
    if field is None or field.is_required():
        return UNSET
    if sections == ["algorithm"]:
        preset = with_defaults(config.get("algorithm") or {})
        if name in preset:
            return preset[name]
    default = field.get_default(call_default_factory=True)
    return UNSET if isinstance(default, BaseModel) else default


def _section_of(field: FieldInfo | None) -> type[BaseModel] | None:
    """Return the class of a section, also of an optional one."""
    kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)

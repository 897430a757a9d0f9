"""Rollouts of a step as columns, from a few values per rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_mega.observe.rollout_files.columns import RaggedColumn, RolloutColumns
from grpo_mega.observe.rollout_files.part_writer import write_part

DEFAULTS: dict[str, Any] = {
    "group": 0,
    "member": 0,
    "prompt_index": 7,
    "replica": 0,
    "policy_version": 3,
    "num_turns": 1,
    "reward": 1.0,
    "advantage": 0.5,
    "data_set": "train",
    "prompt": "12+34=",
    "completion": "46",
    "answer": "46",
    "stop_reason": "eos",
    "reward_components": {"exact": 1.0},
    "reward_failures": [],
    "prompt_ids": [1, 2],
    "completion_ids": [4, 6, 0],
    "sampler_log_probs": [-0.5, -0.25, -0.125],
    "old_log_probs": [-1.0, -2.0, -3.0],
    "loss_mask": None,
    "policy_versions": None,
    "steps": None,
    "expert_choices": None,
}
_RAGGED = {
    "prompt_ids": np.int32,
    "completion_ids": np.int32,
    "sampler_log_probs": np.float32,
    "old_log_probs": np.float32,
    "loss_mask": np.bool_,
    "policy_versions": np.int32,
    "expert_choices": np.int16,
}
_LISTS = {"data_set", "prompt", "completion", "answer", "stop_reason", "reward_components", "reward_failures", "steps"}
_DTYPES = {"prompt_index": np.int64, "reward": np.float64, "advantage": np.float64}


def columns_of(*rows: Mapping[str, Any], step: int = 12, expert_shape: tuple[int, int] | None = None) -> RolloutColumns:
    """Return one rollout per mapping, which gives the values that differ from DEFAULTS."""
    full = [DEFAULTS | {"group": i} | dict(row) for i, row in enumerate(rows)]
    found: dict[str, Any] = {}
    for name in DEFAULTS:
        values: Sequence[Any] = [row[name] for row in full]
        if name in _RAGGED:
            found[name] = None if all(v is None for v in values) else RaggedColumn.of_rows(values, _RAGGED[name])
        elif name in _LISTS:
            found[name] = values
        else:
            found[name] = np.array([np.nan if v is None else v for v in values], _DTYPES.get(name, np.int32))
    return RolloutColumns(step=step, expert_shape=expert_shape, **found)


def write_step(run: Path, step: int, *parts: Sequence[Mapping[str, Any]]) -> Path:
    """Write the parts of a step to `rollouts/` of a run folder, and return the folder of the step."""
    folder = run / "rollouts" / f"step_{step:06d}"
    for number, rows in enumerate(parts):
        write_part(folder, number, len(parts), columns_of(*rows, step=step))
    return folder

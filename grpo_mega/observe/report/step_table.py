"""The rollouts of one step as a table, of which a report takes a few groups and the tokens with the largest mismatch.

Asserted by tests/unit/observe/report/test_rollout_sample.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grpo_mega.observe.rollout_files.plain_rows import RolloutRow
from grpo_mega.observe.rollout_files.reader import StepRollouts, read_step

_COLUMNS = (
    "group", "member", "prompt_index", "data_set", "prompt", "completion", "answer", "reward", "reward_components",
    "advantage", "stop_reason", "completion_ids", "sampler_log_probs", "old_log_probs",
)  # fmt: skip


@dataclass(frozen=True)
class WorstToken:
    """A token and the log-probs of engine and policy for it, in nats; `mismatch` is policy - engine."""

    prompt_index: int
    position: int
    token: int
    mismatch: float
    sampler: float
    policy: float


def step_folder(rollouts: Path, step: int) -> Path:
    """Return the folder of a step in `rollouts/` of a run."""
    return rollouts / f"step_{step:06d}"


@dataclass(frozen=True)
class StepTable:
    """The rollouts of a step, in the order of group and member."""

    rollouts: StepRollouts

    @classmethod
    def read(cls, folder: Path) -> StepTable:
        """Read the folder of a step.

        Raises:
            UserError: see `read_step`.
        """
        return cls(read_step(folder, _COLUMNS))

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence for each part that is damaged or missing."""
        return self.rollouts.problems

    def groups_by_reward(self) -> list[int]:
        """Return the groups from the highest to the lowest mean reward; groups without a reward come last."""
        means = self.rollouts.table.group_by("group").aggregate([("reward", "mean")])
        ordered = means.sort_by([("reward_mean", "descending"), ("group", "ascending")])
        found: list[int] = ordered["group"].to_pylist()
        return found

    def rows_of(self, groups: Sequence[int]) -> list[list[RolloutRow]]:
        """Return the rollouts of these groups, in the order of `groups`."""
        table = self.rollouts.table
        selected = table.filter(pc.is_in(table["group"], pa.array(groups, table["group"].type)))
        by_group = {key: list(rows) for key, rows in groupby(self.rollouts.rows(selected), lambda row: row["group"])}
        return [by_group[group] for group in groups]

    def worst_tokens(self, count: int) -> list[WorstToken]:
        """Return the tokens with the largest mismatch of policy and engine; none if the policy's are not known."""
        table = self.rollouts.table
        table = table.filter(pc.is_valid(table["old_log_probs"]))
        sampler, policy = (_flat(table[name]) for name in ("sampler_log_probs", "old_log_probs"))
        if not len(policy):
            return []
        tokens, differences = _flat(table["completion_ids"]), policy - sampler
        ends = np.cumsum(pc.list_value_length(table["completion_ids"]).to_numpy())
        worst = np.argsort(-np.abs(differences), kind="stable")[:count]
        prompts = table["prompt_index"].to_numpy()
        rows = np.searchsorted(ends, worst, side="right")
        starts = np.concatenate([[0], ends])[rows]
        return [
            WorstToken(
                int(prompts[row]), int(i - start), int(tokens[i]), float(differences[i]), float(sampler[i]),
                float(policy[i]),
            )
            for i, row, start in zip(worst, rows, starts, strict=True)
        ]  # fmt: skip


def _flat(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = pc.list_flatten(column).to_numpy()
    return found

"""The rollouts of one prompt shard as columns: arrays for numbers and tokens, lists for texts.

Nothing in it is a Python object per token. Asserted by tests/unit/observe/rollout_files/test_columns.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RaggedColumn:
    """Rows of different lengths: row i is `values[offsets[i] : offsets[i + 1]]`.

    Args:
        values: all rows, one after the other.
        offsets: [N + 1] int64, ascending, from 0.
        present: [N] bool; False for a row that is null (its length is 0). None: no row is null.
    """

    values: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    present: npt.NDArray[np.bool_] | None = None

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[Any] | npt.NDArray[Any] | None], dtype: npt.DTypeLike) -> RaggedColumn:
        """Join rows; a row that is None is null."""
        arrays = [np.zeros(0, dtype) if row is None else np.asarray(row, dtype).reshape(-1) for row in rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        present = np.array([row is not None for row in rows], np.bool_)
        values = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
        return cls(values, offsets, None if present.all() else present)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Length of each row, [N]."""
        return np.diff(self.offsets)

    def rows(self, first: int, end: int) -> RaggedColumn:
        """Return the rows `first` to `end - 1`, without a copy of their values."""
        offsets = self.offsets[first : end + 1]
        present = None if self.present is None else self.present[first:end]
        return RaggedColumn(self.values[offsets[0] : offsets[-1]], offsets - offsets[0], present)

    def take(self, positions: npt.NDArray[np.integer[Any]]) -> RaggedColumn:
        """Return the rows at these positions, in their order."""
        offsets = np.zeros(len(positions) + 1, np.int64)
        np.cumsum(self.lengths[positions], out=offsets[1:])
        parts = [self.values[self.offsets[i] : self.offsets[i + 1]] for i in positions]
        values = np.concatenate(parts) if parts else self.values[:0]
        return RaggedColumn(values, offsets, None if self.present is None else self.present[positions])


@dataclass(frozen=True)
class RolloutColumns:
    """Columns of N rollouts of one step (column_table.py has their meanings).

    `reward` is NaN where there is none. `old_log_probs`, `loss_mask`, `policy_versions`, `steps` and `expert_choices`
    are None if all their rows are null. `steps` has pairs (end_token, value). `expert_shape` is (layers, choices).

    Raises:
        ValueError: columns differ in their number of rows, or columns of completion tokens in the lengths of a row.
    """

    step: int
    group: npt.NDArray[np.int32]
    member: npt.NDArray[np.int32]
    prompt_index: npt.NDArray[np.int64]
    replica: npt.NDArray[np.int32]
    policy_version: npt.NDArray[np.int32]
    num_turns: npt.NDArray[np.int32]
    reward: npt.NDArray[np.float64]
    advantage: npt.NDArray[np.float64]
    data_set: Sequence[str]
    prompt: Sequence[str]
    completion: Sequence[str]
    answer: Sequence[str]
    stop_reason: Sequence[str]
    reward_components: Sequence[Mapping[str, float]]
    reward_failures: Sequence[Sequence[str]]
    prompt_ids: RaggedColumn
    completion_ids: RaggedColumn
    sampler_log_probs: RaggedColumn
    old_log_probs: RaggedColumn | None = None
    loss_mask: RaggedColumn | None = None
    policy_versions: RaggedColumn | None = None
    steps: Sequence[Sequence[tuple[int, float]] | None] | None = None
    expert_choices: RaggedColumn | None = None
    expert_shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the lengths."""
        for field in fields(self):
            column = getattr(self, field.name)
            if isinstance(column, RaggedColumn):
                column = column.lengths
            if field.name not in ("step", "expert_shape") and column is not None and len(column) != len(self):
                raise ValueError(f"{field.name} has {len(column)} rows; group has {len(self)}")
        for name in ("sampler_log_probs", "old_log_probs", "loss_mask", "policy_versions"):
            column = getattr(self, name)
            if column is None:
                continue
            present = np.ones(len(self), np.bool_) if column.present is None else column.present
            wrong = np.flatnonzero(present & (column.lengths != self.completion_ids.lengths))
            if len(wrong):
                i = int(wrong[0])
                raise ValueError(
                    f"{name} of a rollout of prompt {self.prompt_index[i]} has {column.lengths[i]} entries for "
                    f"{self.completion_ids.lengths[i]} completion tokens; it must have one per token"
                )

    def __len__(self) -> int:
        """Number of rollouts."""
        return len(self.group)

    def take(self, positions: npt.NDArray[np.integer[Any]]) -> RolloutColumns:
        """Return the rollouts at these positions, in their order."""
        found: dict[str, Any] = {"step": self.step, "expert_shape": self.expert_shape}
        for field in fields(self):
            column = getattr(self, field.name)
            if field.name in found or column is None:
                continue
            if isinstance(column, RaggedColumn):
                found[field.name] = column.take(positions)
            else:
                is_array = isinstance(column, np.ndarray)
                found[field.name] = column[positions] if is_array else [column[i] for i in positions]
        return RolloutColumns(**found)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all prompts and completions."""
        return len(self.prompt_ids.values) + len(self.completion_ids.values)

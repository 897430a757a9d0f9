"""Rollouts as plain values, for display and for scripts.

Asserted by tests/unit/observe/rollout_files/test_reader.py.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from grpo_mega.observe.rollout_files.arrow_table import record_batches
from grpo_mega.observe.rollout_files.columns import RolloutColumns

RolloutRow = dict[str, Any]
"""A rollout as plain values: a key per column. `reward_components` is a dictionary, `steps` a list of pairs."""


def plain_rows(batch: pa.RecordBatch) -> list[RolloutRow]:
    """Return the rows of a record batch as plain values."""
    rows: list[RolloutRow] = batch.to_pylist()
    for row in rows:
        if "reward_components" in row:
            row["reward_components"] = dict(row["reward_components"])
        if row.get("steps") is not None:
            row["steps"] = [(step["end_token"], step["value"]) for step in row["steps"]]
    return rows


def rows_of(columns: RolloutColumns) -> list[RolloutRow]:
    """Return all rollouts as plain values; for a few rollouts that are shown."""
    return [row for batch in record_batches(columns) for row in plain_rows(batch)]

"""The table of columns, and the contract of column names."""

from __future__ import annotations

import pyarrow as pa

from grpo_mega.observe.rollout_files.column_table import COLUMN_BY_NAME, COLUMNS, SCHEMA, reference
from tools.dev.make_rollouts_reference import REFERENCE

# The names that scripts rely on; a change here breaks them, and needs another SCHEMA_VERSION.
STABLE = {
    "prompt": pa.string(),
    "completion": pa.string(),
    "answer": pa.string(),
    "reward": pa.float64(),
    "reward_components": pa.map_(pa.string(), pa.float64()),
    "advantage": pa.float64(),
    "stop_reason": pa.string(),
    "policy_version": pa.int32(),
    "prompt_ids": pa.list_(pa.int32()),
    "completion_ids": pa.list_(pa.int32()),
    "sampler_log_probs": pa.list_(pa.float32()),
    "old_log_probs": pa.list_(pa.float32()),
}


def test_the_stable_columns_keep_their_types() -> None:
    assert {name: SCHEMA.field(name).type for name in STABLE} == STABLE


def test_every_column_has_a_name_of_its_own_and_a_meaning() -> None:
    assert len(COLUMN_BY_NAME) == len(COLUMNS)
    assert all(column.meaning for column in COLUMNS)


def test_the_committed_reference_is_up_to_date() -> None:
    assert REFERENCE.read_text() == reference(), "run python tools/dev/make_rollouts_reference.py"

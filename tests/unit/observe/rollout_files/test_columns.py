"""Ragged columns, and their conversion to Arrow."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_mega.observe.rollout_files import arrow_table
from grpo_mega.observe.rollout_files.arrow_table import record_batches
from grpo_mega.observe.rollout_files.columns import RaggedColumn
from tests.helpers.step_columns import columns_of


def rows_of(column: RaggedColumn) -> list[list[int] | None]:
    present = [True] * len(column.lengths) if column.present is None else column.present
    return [
        column.values[a:b].tolist() if here else None
        for a, b, here in zip(column.offsets[:-1], column.offsets[1:], present, strict=True)
    ]


def test_a_ragged_column_keeps_rows_and_nulls_under_slices_and_choices() -> None:
    rows = [[1, 2], None, [], [3, 4, 5]]
    column = RaggedColumn.of_rows(rows, np.int32)
    assert rows_of(column) == rows
    assert rows_of(column.rows(1, 4)) == rows[1:]
    assert column.rows(3, 4).values.base is not None, "a slice is no copy"
    assert rows_of(column.take(np.array([3, 0, 3, 1]))) == [rows[3], rows[0], rows[3], None]
    assert rows_of(column.take(np.array([], np.int64))) == []


def test_columns_of_different_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"old_log_probs of a rollout of prompt 7 has 2 entries for 3 completion tok"):
        columns_of({}, {"old_log_probs": [-1.0, -2.0]})
    with pytest.raises(ValueError, match=r"loss_mask of a rollout of prompt 8 has 1 entries for 3 "):
        columns_of({"loss_mask": None}, {"loss_mask": [True], "prompt_index": 8})
    columns = columns_of({}, {})
    with pytest.raises(ValueError, match="prompt has 1 rows; group has 2"):
        type(columns)(**{**vars(columns), "prompt": ["one"]})


def test_batches_have_a_bounded_number_of_tokens_and_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 5, 5, 5, 40 and 5 tokens in batches of at most 10 tokens: a longer row is alone."""
    monkeypatch.setattr(arrow_table, "MAX_BATCH_TOKENS", 10)
    long = {"completion_ids": [9] * 38, "sampler_log_probs": [-1.0] * 38, "old_log_probs": None}
    batches = list(record_batches(columns_of({}, {}, {}, long, {})))
    assert [batch.num_rows for batch in batches] == [2, 1, 1, 1]
    assert [n for batch in batches for n in batch.column("group").to_pylist()] == [0, 1, 2, 3, 4]
    assert batches[2].column("completion_ids").to_pylist() == [[9] * 38]
    assert batches[2].column("old_log_probs").to_pylist() == [None]
    assert batches[3].column("completion_ids").to_pylist() == [[4, 6, 0]]

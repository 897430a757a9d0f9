"""Builds Arrow record batches from `RolloutColumns`, without a copy of the values of tokens.

Asserted by tests/unit/observe/rollout_files/test_columns.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from itertools import chain
from operator import methodcaller
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grpo_mega.observe.rollout_files.column_table import SCHEMA
from grpo_mega.observe.rollout_files.columns import RaggedColumn, RolloutColumns

MAX_BATCH_TOKENS = 2**20
"""Tokens of one record batch, which becomes one row group of the file. Offsets inside a batch are 32-bit."""
_TEXTS = ("data_set", "prompt", "completion", "answer", "stop_reason")
_NUMBERS = ("group", "member", "prompt_index", "replica", "policy_version", "num_turns", "advantage")
_RAGGED = ("prompt_ids", "completion_ids", "sampler_log_probs", "old_log_probs", "loss_mask", "policy_versions",
           "expert_choices")  # fmt: skip


def record_batches(columns: RolloutColumns) -> Iterator[pa.RecordBatch]:
    """Yield the rows in order, in batches of at most `MAX_BATCH_TOKENS` tokens or of one row."""
    first, count = 0, len(columns)
    ends = np.cumsum(columns.prompt_ids.lengths + columns.completion_ids.lengths)
    while first < count:
        before = ends[first - 1] if first else 0
        end = max(first + 1, int(np.searchsorted(ends, before + MAX_BATCH_TOKENS, side="right")))
        yield _record_batch(columns, first, end)
        first = end


def _record_batch(columns: RolloutColumns, first: int, end: int) -> pa.RecordBatch:
    def rows(name: str) -> Any:
        return getattr(columns, name)[first:end]

    reward = rows("reward")
    found: dict[str, pa.Array] = {
        "step": pa.array(np.full(end - first, columns.step, np.int32)),
        "reward": pa.array(reward, mask=np.isnan(reward)),
        "reward_components": _map(rows("reward_components")),
        "reward_failures": _lists(rows("reward_failures")),
        "steps": _steps(None if columns.steps is None else rows("steps"), end - first),
    }
    for name in _TEXTS:
        found[name] = _texts(rows(name))
    for name in _NUMBERS:
        found[name] = pa.array(rows(name), SCHEMA.field(name).type)
    for name in _RAGGED:
        column: RaggedColumn | None = getattr(columns, name)
        found[name] = _list_array(None if column is None else column.rows(first, end), name, end - first)
    return pa.RecordBatch.from_arrays([found[name] for name in SCHEMA.names], schema=SCHEMA)


def _texts(texts: Sequence[str]) -> pa.Array:
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return pa.array([encodable(text) for text in texts], pa.string())


def encodable(text: str) -> str:
    r"""Return the text with every lone surrogate, which UTF-8 cannot encode, as `\ud800`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


def _list_array(column: RaggedColumn | None, name: str, count: int) -> pa.Array:
    of_type = SCHEMA.field(name).type
    if column is None:
        return pa.nulls(count, of_type)
    mask = None if column.present is None else pa.array(~column.present)
    values = pa.array(np.ascontiguousarray(column.values), of_type.value_type)
    return pa.ListArray.from_arrays(pa.array(column.offsets.astype(np.int32)), values, type=of_type, mask=mask)


def _map(rows: Sequence[Any]) -> pa.Array:
    keys = pa.array(list(chain.from_iterable(rows)), pa.string())
    values = np.fromiter(chain.from_iterable(map(methodcaller("values"), rows)), np.float64, len(keys))
    return pa.MapArray.from_arrays(_offsets(rows), keys, pa.array(values))


def _lists(rows: Sequence[Sequence[str]]) -> pa.Array:
    return pa.ListArray.from_arrays(_offsets(rows), pa.array(list(chain.from_iterable(rows)), pa.string()))


def _offsets(rows: Sequence[Sized]) -> pa.Array:
    offsets: npt.NDArray[np.int32] = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, rows), np.int32, len(rows)), out=offsets[1:])
    return pa.array(offsets)


def _steps(rows: Sequence[Sequence[tuple[int, float]] | None] | None, count: int) -> pa.Array:
    of_type = SCHEMA.field("steps").type
    if rows is None:
        return pa.nulls(count, of_type)
    as_structs = [None if row is None else [{"end_token": e, "value": v} for e, v in row] for row in rows]
    return pa.array(as_structs, of_type)

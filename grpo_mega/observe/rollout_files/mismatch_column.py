"""The column `mismatch`: log-probs of the policy as rounded differences from those of the engine.

Readers of rollouts need the difference to a few digits, to find and to color tokens. A replay reads the log-probs of
the engine, which are stored in full, computes those of the policy again, and compares them as they are stored.
Asserted by tests/unit/observe/rollout_files/test_mismatch_column.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from grpo_mega.observe.rollout_files.column_table import FILE_SCHEMA, MISMATCH_BITS, SCHEMA

_DROPPED = 23 - MISMATCH_BITS
"""Bits of a float32 mantissa that rounding sets to 0."""
_BLOCK = 1 << 16  # numbers that are rounded at once, so that they stay in the cache


def rounded_differences(old: NDArray[np.float32], sampler: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return old - sampler with `MISMATCH_BITS + 1` significant bits, rounded to nearest, halves to even.

    The results are numbers of float16: below 6e-5 they have its spacing there, 6e-8, and above 65,504 they are
    infinite. In float32 their bytes compress as well, and Parquet writes them in half of the time.
    """
    import torch  # readers of rollouts start without it

    half = 1 << (_DROPPED - 1)
    found, difference = torch.empty(len(old), dtype=torch.float32), np.empty(_BLOCK, np.float32)
    for begin in range(0, len(old), _BLOCK):
        part = slice(begin, min(begin + _BLOCK, len(old)))
        exact = difference[: part.stop - begin]
        with np.errstate(invalid="ignore"):
            np.subtract(old[part], sampler[part], out=exact)
        block = torch.from_numpy(exact)
        bits = block.view(torch.int32)
        kept = (bits >> _DROPPED).bitwise_and_(1).add_(bits).add_(half - 1).bitwise_and_(-1 << _DROPPED)
        if block.sum().isnan():  # the sums above may have carried into the sign of NaN
            kept = torch.where(block.isnan(), bits, kept)
        found[part] = kept.view(torch.float32).half()
    return found.numpy()


def as_stored(old: NDArray[np.float32], sampler: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return log-probs of the policy as a reader of the files gets them, from those of policy and engine."""
    with np.errstate(invalid="ignore"):
        return np.asarray(sampler + rounded_differences(old, sampler))


def with_mismatch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the columns of a file from those of the rows in memory."""
    old, sampler = batch.column("old_log_probs"), batch.column("sampler_log_probs")
    of_type = FILE_SCHEMA.field("mismatch").type
    mismatch = pa.nulls(len(batch), of_type)
    if old.null_count < len(old):
        known = _values(sampler.filter(old.is_valid()) if old.null_count else sampler)
        values = pa.array(rounded_differences(_values(old), known))
        mask = pc.is_null(old) if old.null_count else None
        mismatch = pa.ListArray.from_arrays(_offsets(old), values, type=of_type, mask=mask)
    columns = [mismatch if name == "mismatch" else batch.column(name) for name in FILE_SCHEMA.names]
    return pa.RecordBatch.from_arrays(columns, schema=FILE_SCHEMA)


def with_old_log_probs(table: pa.Table) -> pa.Table:
    """Return a table of a file with `old_log_probs` in place of `mismatch`; it has `sampler_log_probs` too."""
    mismatch, sampler = (table[name].combine_chunks() for name in ("mismatch", "sampler_log_probs"))
    of_type = SCHEMA.field("old_log_probs").type
    old = pa.nulls(len(table), of_type)
    if mismatch.null_count < len(mismatch):
        known = _values(sampler.filter(mismatch.is_valid()) if mismatch.null_count else sampler)
        values = pa.array(known + _values(mismatch))
        mask = pc.is_null(mismatch) if mismatch.null_count else None
        old = pa.ListArray.from_arrays(_offsets(mismatch), values, type=of_type, mask=mask)
    place = table.schema.get_field_index("mismatch")
    return table.set_column(place, SCHEMA.field("old_log_probs"), old)


def _values(column: pa.ListArray) -> NDArray[Any]:
    found: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return found


def _offsets(column: pa.ListArray) -> pa.Array:
    """Return the offsets of the column, from 0."""
    offsets = column.offsets.to_numpy()
    return pa.array((offsets - offsets[0]).astype(np.int32))

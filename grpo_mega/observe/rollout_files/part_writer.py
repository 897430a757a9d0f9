"""Writes one part of a step's rollouts, whole or not at all.

Asserted by tests/unit/observe/rollout_files/test_part_writer.py.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_mega.observe.atomic_files import TEMPORARY_SUFFIX
from grpo_mega.observe.rollout_files.arrow_table import record_batches
from grpo_mega.observe.rollout_files.column_table import (
    COLUMNS,
    EXPERT_SHAPE_KEY,
    FILE_SCHEMA,
    NUM_PARTS_KEY,
    PART_KEY,
    SCHEMA_VERSION,
    VERSION_KEY,
)
from grpo_mega.observe.rollout_files.columns import RolloutColumns
from grpo_mega.observe.rollout_files.mismatch_column import with_mismatch

COMPRESSION_LEVEL = 1
"""Level of zstd. Higher levels are slower and do not make columns of byte planes smaller."""
WRITE_BATCH = 1 << 16
"""Values that are encoded at once, a quarter of a page of tokens. Arrow's default of 1,024 takes more time."""


class RolloutFileError(RuntimeError):
    """A part of a step's rollouts could not be written. Names the file, the reason and the free space."""


def part_path(folder: Path, part: int) -> Path:
    """Return the path of a part in the folder of its step."""
    return folder / f"part-{part:05d}.parquet"


def write_part(folder: Path, part: int, num_parts: int, columns: RolloutColumns) -> None:
    """Write `part-NNNNN.parquet`. A reader, also after a crash, finds the whole file or none. Equal columns give equal
    bytes.

    Args:
        folder: folder of the step, which is created.
        part: index of the prompt shard.
        num_parts: number of prompt shards.
        columns: rollouts, in the order of `group` and `member`; there may be none.

    Raises:
        RolloutFileError: the file cannot be written.
    """
    path = part_path(folder, part)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:  # opened before the first write, so that fsync reports errors of all writes
            with pa.OSFile(str(temporary), "wb") as sink:
                _write(sink, part, num_parts, columns)
            os.fsync(file.fileno())
        temporary.replace(path)
        for parent in (folder, folder.parent):
            _sync_folder(parent)
    except (OSError, pa.ArrowException) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RolloutFileError(
            f"rollouts of step {columns.step}: {path} cannot be written ({error}); its file system has "
            f"{_free_bytes(folder)} bytes free. The run stops, and its complete checkpoints are unchanged; after "
            "freeing space, the same command continues from the newest and makes this step again"
        ) from error


def _write(sink: pa.NativeFile, part: int, num_parts: int, columns: RolloutColumns) -> None:
    metadata = {VERSION_KEY: f"{SCHEMA_VERSION}", PART_KEY: f"{part}", NUM_PARTS_KEY: f"{num_parts}"}
    if columns.expert_shape is not None:
        metadata[EXPERT_SHAPE_KEY] = ",".join(map(str, columns.expert_shape))
    stored = [column for column in COLUMNS if column.where != "in rows"]
    encodings = {column.parquet_path: "BYTE_STREAM_SPLIT" for column in stored if column.encoding == "byte planes"}
    with pq.ParquetWriter(
        sink,
        FILE_SCHEMA.with_metadata(metadata),
        compression="zstd",
        compression_level=COMPRESSION_LEVEL,
        use_dictionary=[column.parquet_path for column in stored if column.encoding == "dictionary"],
        column_encoding=encodings,
        write_statistics=[column.name for column in stored if not pa.types.is_nested(column.type)],
        write_page_checksum=True,
        write_batch_size=WRITE_BATCH,
    ) as writer:
        for batch in record_batches(columns):
            writer.write_batch(with_mismatch(batch), row_group_size=max(1, batch.num_rows))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(folder: Path) -> int:
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free

"""Reads the rollout files of a step, and names the parts that are damaged or missing.

Asserted by tests/unit/observe/rollout_files/test_reader.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_mega.observe.rollout_files.column_table import (
    EXPERT_SHAPE_KEY,
    NUM_PARTS_KEY,
    PART_KEY,
    SCHEMA,
    SCHEMA_VERSION,
    VERSION_KEY,
)
from grpo_mega.observe.rollout_files.mismatch_column import with_old_log_probs
from grpo_mega.observe.rollout_files.part_writer import part_path
from grpo_mega.observe.rollout_files.plain_rows import RolloutRow, plain_rows
from grpo_mega.types import UserError

_STEP_NAME = re.compile(r"step_(\d{6,})")
_OLDER_NAME = re.compile(r"step_(\d{6,})\.jsonl")
_ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class StepRollouts:
    """The rollouts of a step that could be read, in the order of group and member.

    Attributes:
        table: the rows of all parts that could be read.
        problems: a sentence for each part that is damaged or missing.
        expert_shape: layers and choices per token of `expert_choices`; None if nothing was recorded.
    """

    table: pa.Table
    problems: tuple[str, ...] = ()
    expert_shape: tuple[int, int] | None = None

    def rows(self, selected: pa.Table | None = None) -> Iterator[RolloutRow]:
        """Yield the rows as plain values, a few hundred at a time in memory; of `selected` rows, or of all."""
        table = self.table if selected is None else selected
        for batch in table.to_batches(max_chunksize=_ROWS_AT_A_TIME):
            yield from plain_rows(batch)


def steps_of(rollouts: Path) -> list[int]:
    """Return the steps in the folder `rollouts/` of a run, in ascending order; none if there is no folder.

    Raises:
        UserError: the folder holds rollouts of an older version of this program only.
    """
    names = [path.name for path in rollouts.iterdir() if path.is_dir()] if rollouts.is_dir() else []
    found = sorted(int(named[1]) for name in names if (named := _STEP_NAME.fullmatch(name)))
    if not found and rollouts.is_dir():
        older = sorted(path.name for path in rollouts.iterdir() if _OLDER_NAME.fullmatch(path.name))
        if older:
            raise _written_by_an_older_version(rollouts / older[0])
    return found


def read_step(folder: Path, columns: Sequence[str] | None = None) -> StepRollouts:
    """Read `rollouts/step_NNNNNN/` of a run.

    A part that cannot be read, that has another version of the columns, or that is not there although another part
    counts it, becomes a sentence in `problems`.

    Args:
        folder: folder of the step, or one of its parts.
        columns: columns to read; None: all.

    Raises:
        UserError: there is no such folder, it has no parts, or an older version of this program wrote it.
    """
    paths = [folder] if folder.is_file() else _part_paths(folder)
    tables, problems, expected, shape = [], list[str](), set[int](), None
    present = {path.name for path in paths}
    for path in paths:
        try:
            table, metadata = _read_part(path, columns)
        except (OSError, ValueError, pa.ArrowException) as error:
            problems.append(f"{path} is damaged ({' '.join(str(error).split()) or type(error).__name__})")
            continue
        tables.append(table)
        expected.update(range(int(metadata[NUM_PARTS_KEY])))
        if EXPERT_SHAPE_KEY in metadata:
            layers, choices = metadata[EXPERT_SHAPE_KEY].decode().split(",")
            shape = (int(layers), int(choices))
    if folder.is_dir():
        missing = [path for part in sorted(expected) if (path := part_path(folder, part)).name not in present]
        problems += [f"{path} is missing: the step has {len(expected)} parts" for path in missing]
    names = SCHEMA.names if columns is None else list(columns)
    empty = pa.schema([SCHEMA.field(name) for name in names]).empty_table()
    table = pa.concat_tables(tables) if tables else empty
    if tables and {"group", "member"} <= set(names):
        table = table.sort_by([("group", "ascending"), ("member", "ascending")])
    return StepRollouts(table, tuple(problems), shape)


def read_rows(folder: Path) -> list[RolloutRow]:
    """Return all rows of a step, for tools that need every rollout.

    Raises:
        UserError: see `read_step`; or a part is damaged or missing.
    """
    found = read_step(folder)
    if found.problems:
        raise UserError("; ".join(found.problems), remedy="use another step, or let the run make this one again")
    return list(found.rows())


def _part_paths(folder: Path) -> list[Path]:
    older = folder.with_name(f"{folder.name}.jsonl")
    if not folder.is_dir() and older.is_file():
        raise _written_by_an_older_version(older)
    if not folder.is_dir():
        raise UserError(
            f"{folder} was not found", remedy="name rollouts/step_NNNNNN of a run with observe.rollouts=all"
        )
    paths = sorted(folder.glob("part-*.parquet"))
    if not paths:
        raise UserError(
            f"{folder} has no complete part (part-NNNNN.parquet)",
            remedy="wait until the step is written; a run that was killed before makes the step again",
        )
    return paths


def _written_by_an_older_version(path: Path) -> UserError:
    return UserError(
        f"{path} was written by an older version of grpo_mega, as JSON and not as Parquet",
        remedy="read the file itself, which has one JSON object per rollout; steps from now on are written as Parquet",
    )


def _read_part(path: Path, columns: Sequence[str] | None) -> tuple[pa.Table, Mapping[bytes, bytes]]:
    """Read a part with its checksums.

    Raises:
        ValueError, OSError, pa.ArrowException: the file is damaged or of another version.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        metadata = file.schema_arrow.metadata or {}
        version = metadata.get(VERSION_KEY, b"").decode()
        if version != f"{SCHEMA_VERSION}":
            raise ValueError(
                f"version {version or 'unknown'} of the columns; this program reads version {SCHEMA_VERSION}"
            )
        if PART_KEY not in metadata or NUM_PARTS_KEY not in metadata:
            raise ValueError(f"the metadata lacks {PART_KEY.decode()} or {NUM_PARTS_KEY.decode()}")
        names = SCHEMA.names if columns is None else list(columns)
        stored = [name for name in names if name != "old_log_probs"]
        if "old_log_probs" in names:
            stored += [name for name in ("mismatch", "sampler_log_probs") if name not in stored]
        table = file.read(columns=stored)
    if "mismatch" in stored:
        table = with_old_log_probs(table)
    fields = pa.schema([SCHEMA.field(name) for name in names])
    return table.select(names).cast(fields), metadata

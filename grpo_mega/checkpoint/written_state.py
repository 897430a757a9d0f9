"""Reads a checkpoint back from its files, compares it with the live state, and describes its files. Collective.

Every rank reads the files that it wrote, or its share of them. A checkpoint of other values than the live ones, for
example of weights before an update, is an error before the checkpoint becomes visible.
Asserted by tests/parallel/test_checkpoint.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch.distributed as dist

from grpo_mega.formats.checkpoint_manifest import FileRecord, listed_files, record_of
from grpo_mega.formats.torch_dist_reader import TorchDistFiles
from grpo_mega.models.digest import digest_text, slice_digest, wrap_int64
from grpo_mega.types import StateRecords, TensorRecord, TensorSlice, UserError

_SHARD_NAME = re.compile(r"__(\d+)_\d+\.distcp")


def compare_with_live(folder: Path, live: StateRecords) -> dict[str, FileRecord]:
    """Compare the tensors in the files with the records of the live state; return the records of all files.

    Every file is flushed to disk first.

    Raises:
        RuntimeError: on every rank, if a tensor was not written as it is, or a file cannot be read (names it).
    """
    try:
        mine: Any = (_written_sums(folder, live), _file_records(folder), "")
    except (UserError, OSError) as error:
        mine = ({}, {}, str(error))
    found = _gathered(mine)
    problems = [text for _, _, text in found if text] or list(_compared([sums for sums, _, _ in found], live))
    if problems:
        raise RuntimeError(
            f"checkpoint {folder}: what was written is not the present state: {'; '.join(problems[:3])}"
            + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        )
    return {name: record for _, records, _ in found for name, record in records.items()}


def owned_files(folder: Path) -> list[str]:
    """Return the files that this rank reads: of a shard `__RANK_N.distcp` rank RANK is the owner."""
    return [name for i, name in enumerate(listed_files(folder)) if _owner(name, i) == dist.get_rank()]


def _owner(name: str, position: int) -> int:
    shard = _SHARD_NAME.fullmatch(Path(name).name)
    return (int(shard[1]) if shard else position) % dist.get_world_size()


def _written_sums(folder: Path, live: StateRecords) -> dict[tuple[str, str], int]:
    """Return the digests of the chunks in this rank's files, summed by folder and tensor."""
    sums: dict[tuple[str, str], int] = {}
    mine = {folder / name for name in owned_files(folder)}
    for place, records in live.items():
        with closing(TorchDistFiles(folder / place)) as files:
            for name, tensor in files.tensors.items():
                record = records.get(name)
                if record is None:
                    raise UserError(f"{folder / place}: holds {name}, which the present state does not have")
                if dist.get_rank() == 0:
                    files.check(name)
                for chunk in tensor.chunks:
                    if chunk.path not in mine:
                        continue
                    # rows that pad the vocabulary are not part of the record
                    rows = max(0, min(chunk.shape[0], record.shape[0] - chunk.offsets[0]))
                    shape = (rows, *chunk.shape[1:])
                    digest = slice_digest(
                        files.chunk_values(name, chunk, shape), TensorSlice(name, chunk.offsets, shape)
                    )
                    sums[place, name] = wrap_int64(sums.get((place, name), 0) + digest)
    return sums


def _file_records(folder: Path) -> dict[str, FileRecord]:
    records = {}
    for name in owned_files(folder):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        records[name] = record_of(folder / name)
    return records


def _compared(sums: list[dict[tuple[str, str], int]], live: StateRecords) -> list[str]:
    total: dict[tuple[str, str], int] = {}
    for found in sums:
        for key, part in found.items():
            total[key] = wrap_int64(total.get(key, 0) + part)
    wanted: Mapping[tuple[str, str], TensorRecord] = {
        (place, name): record for place, records in live.items() for name, record in records.items()
    }
    return [
        f"{place}/{name} has digest {written}, the present state has {record.digest}"
        for (place, name), record in wanted.items()
        if (written := digest_text(total[place, name]) if (place, name) in total else "none") != record.digest
    ]


def _gathered(mine: Any) -> list[Any]:
    if dist.get_world_size() == 1:
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found

"""Reads a checkpoint back from its files, compares it with the live state, and describes its files.

Every rank reads the files that it wrote; rank 0 also the small ones. A checkpoint of other values than the live ones,
for example of weights before an update, is an error before the checkpoint becomes visible.
Asserted by tests/parallel/test_checkpoint.py and tests/unit/checkpoint/test_written_state.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from grpo_mega.checkpoint.carried_parts import rank_of_part
from grpo_mega.formats.checkpoint_manifest import FileRecord, listed_files, record_of
from grpo_mega.formats.file_parts import write_file
from grpo_mega.formats.torch_dist_reader import StoredChunk, TorchDistFiles
from grpo_mega.models.digest import digest_text, slice_digest, wrap_int64
from grpo_mega.parallel.ranks import first_error
from grpo_mega.types import FileSink, StateRecords, TensorRecord, TensorSlice, UserError

_SHARD_NAME = re.compile(r"__(\d+)_\d+\.distcp")
_BLOCK_BYTES = 1 << 21  # of a tensor that are read and digested at a time; they stay in a cache of the processor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WrittenFiles:
    """Digests and records that a rank has read back from its files.

    Args:
        sums: (folder, tensor) -> sum of the digests of the chunks in these files.
        records: path in the checkpoint -> record of the file.
        problem: why a file could not be read, or empty.
        flush_error: why a file could not be flushed to disk, or empty.
    """

    sums: dict[tuple[str, str], int] = field(default_factory=dict)
    records: dict[str, FileRecord] = field(default_factory=dict)
    problem: str = ""
    flush_error: str = ""

    def require_flushed(self) -> None:
        """Check that the files of all ranks are on the disk. Collective.

        Raises:
            RuntimeError: on every rank, if one could not be flushed (names it).
        """
        if error := first_error(self.flush_error):
            raise RuntimeError(error)


@dataclass(frozen=True)
class _OwnChunk:
    """A chunk of the tensor `name` in a file of this rank, and the shape of its values without padded rows."""

    name: str
    stored: StoredChunk
    shape: Shape


def read_back(
    folder: Path, live: StateRecords, files: FileSink, *, threads: int = 1, each: Callable[[], None] = lambda: None
) -> WrittenFiles:
    """Flush the files of this rank to disk, and read them back meanwhile. Not collective.

    Args:
        folder: the checkpoint.
        live: records of the live state; what a file holds in addition is a problem.
        files: the sink that has written the files of this rank.
        threads: threads that read.
        each: is called often, and may raise.
    """
    rank = dist.get_rank()
    names = [name for name in listed_files(folder) if _owner(name) == rank]
    try:
        with ThreadPoolExecutor(1) as flushing, ThreadPoolExecutor(threads) as pool:
            flushed = flushing.submit(_flush, files, [folder / name for name in names], each)
            records = pool.map(record_of, [folder / name for name in names])
            sums: dict[tuple[str, str], int] = {}
            for place in live:
                mine = {folder / name for name in names}
                with closing(TorchDistFiles(folder / place, mine)) as stored:
                    chunks = list(_own_chunks(stored, mine, live[place], is_first=rank == 0))
                    digests = pool.map(partial(_chunk_digest, stored, each), chunks)
                    for chunk, digest in zip(chunks, digests, strict=True):
                        key = place, chunk.name
                        sums[key] = wrap_int64(sums.get(key, 0) + digest)
            if error := flushed.result():
                return WrittenFiles(flush_error=error)
            return WrittenFiles(sums, dict(zip(names, records, strict=True)))
    except (UserError, OSError) as error:
        return WrittenFiles(problem=str(error))


def _flush(files: FileSink, paths: Sequence[Path], each: Callable[[], None]) -> str:
    """Flush the files of the sink and those that Megatron has written itself; return what failed, or an empty string.

    `each` is called after each file.
    """
    try:
        files.flush(each)
    except OSError as error:
        return str(error)
    for path in paths:
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            return f"{path}: {error.strerror}"
        each()
    return ""


def compare_with_live(folder: Path, live: StateRecords, mine: WrittenFiles) -> dict[str, FileRecord]:
    """Compare what all ranks have read back with the live state; return the records of all files. Collective.

    Raises:
        RuntimeError: on every rank, if a tensor was not written as it is, or a file cannot be read (names it).
    """
    found: list[WrittenFiles] = _gathered(mine)
    problems = [each.problem for each in found if each.problem] or list(_compared([each.sums for each in found], live))
    if problems:
        raise RuntimeError(
            f"checkpoint {folder}: what was written is not the present state: {'; '.join(problems[:3])}"
            + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        )
    return {name: record for each in found for name, record in each.records.items()}


def share_small_files(folder: Path, *, leads: bool) -> None:
    """Write the files of rank 0 that are not a shard, such as `.metadata`, into the folders of the other machines.

    Collective. `leads`: True on the first rank of each machine.

    Raises:
        OSError: they cannot be read or written, on the rank where this happens.
    """
    small: list[dict[str, bytes]] = [{}]
    if dist.get_rank() == 0:
        names = [name for name in listed_files(folder) if _is_small(name)]
        small = [{name: (folder / name).read_bytes() for name in names}]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(small, src=0)
    for name, content in small[0].items():
        if leads and not (folder / name).exists():
            write_file(folder / name, [content]).finish()


def _is_small(name: str) -> bool:
    return _SHARD_NAME.fullmatch(Path(name).name) is None and rank_of_part(Path(name).name) is None


def _owner(name: str) -> int:
    """Return the rank that reads a file: RANK of a shard `__RANK_N.distcp`, otherwise the one that wrote it."""
    shard = _SHARD_NAME.fullmatch(Path(name).name)
    return int(shard[1]) if shard else rank_of_part(Path(name).name) or 0


def _own_chunks(
    files: TorchDistFiles, mine: set[Path], records: Mapping[str, TensorRecord], *, is_first: bool
) -> Iterator[_OwnChunk]:
    """Yield the chunks in the files of this rank. Rank 0 checks that the chunks of each tensor partition it."""
    for name, tensor in files.tensors.items():
        record = records.get(name)
        if record is None:
            raise UserError(f"{files.folder}: holds {name}, which the present state does not have")
        if is_first:
            files.check(name)
        for chunk in tensor.chunks:
            if chunk.path in mine:
                rows = max(0, min(chunk.shape[0], record.shape[0] - chunk.offsets[0]))
                yield _OwnChunk(name, chunk, (rows, *chunk.shape[1:]))


def _chunk_digest(files: TorchDistFiles, each: Callable[[], None], chunk: _OwnChunk) -> int:
    """Read the values of a chunk in blocks, and return their digest. `each` is called before each block."""
    dtype, total = files.tensors[chunk.name].dtype, 0
    memory = torch.empty(0, dtype=dtype)
    for offsets, size in _blocks(chunk.shape, dtype.itemsize):
        each()
        count = math.prod(size)
        if memory.numel() < count:
            memory = torch.empty(count, dtype=dtype)
        values = memory[:count].view(size)
        files.read_chunk(chunk.name, chunk.stored, offsets, values)
        begin = tuple(a + b for a, b in zip(chunk.stored.offsets, offsets, strict=True))
        total += slice_digest(values, TensorSlice(chunk.name, begin, size))
    return wrap_int64(total)


def _blocks(shape: Shape, itemsize: int) -> Iterator[tuple[Shape, Shape]]:
    """Yield (offsets, shape) of consecutive parts: rows of the first dimension that has several."""
    if not shape:
        yield (), ()
    if not shape or not math.prod(shape):
        return
    dim = next((d for d, size in enumerate(shape) if size > 1), 0)
    step = max(1, _BLOCK_BYTES // (math.prod(shape[dim + 1 :]) * itemsize))
    for start in range(0, shape[dim], step):
        offsets = (*(0,) * dim, start, *(0,) * (len(shape) - dim - 1))
        yield offsets, (*shape[:dim], min(step, shape[dim] - start), *shape[dim + 1 :])


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

"""Streaming, parallel and resumable copy of tensor slices into new files.

A conversion is a list of `PlannedFile`s, so the position of each tensor is known before anything is read. Workers fill
chunks of at most 64 MiB, so memory does not grow with the model. All work is done in a `Workspace`. A file gets its
name when its bytes are on disk, then a record of its digests. A second call verifies every byte of the complete files
except padding, keeps them, and writes the others.
Asserted by tests/unit/convert/test_streaming_copy.py and tests/e2e/test_convert_tools.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from grpo_mega.convert.resumable_output import Workspace, write_text
from grpo_mega.formats.byte_ranges import (
    BLOCK_BYTES,
    Shape,
    ShortFileError,
    read_slice,
    tensor_memory,
    write_all,
    write_blocks,
)
from grpo_mega.formats.planned_files import Chunk, ChunkCodec, PlannedFile, TensorSource
from grpo_mega.models.digest import slice_digest, wrap_int64
from grpo_mega.types import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".distcp", ".h5", ".msgpack", ".onnx", ".npz")


@dataclass
class Conversion:
    """One run of workers over `files` into a workspace."""

    files: Sequence[PlannedFile]
    source: TensorSource
    workspace: Workspace
    workers: int
    codec: ChunkCodec | None = None
    redone: list[str] = field(default_factory=list)  # names of the files that this call wrote
    _digests: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _arena: threading.local = field(default_factory=threading.local)

    def run(self, identity: str) -> dict[str, int]:
        """Write all files and return the digest of every Hugging Face tensor.

        Args:
            identity: identifies input and options; unfinished work for another identity is discarded.

        Raises:
            UserError: the disk is full (the message names file, tensor and shape), or the source is damaged.
        """
        self.workspace.begin(f"{identity}\n{self.plan_digest()}")
        open_files: list[_OpenFile] = []
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for folder in {(self.workspace.result / f.name).parent for f in self.files}:
                    folder.mkdir(parents=True, exist_ok=True)
                futures: list[Future[None]] = []
                for planned in [f for f in self.files if not self._is_complete(f, pool)]:
                    open_files.append(_OpenFile(self.workspace, planned))
                    futures += [pool.submit(self._convert, open_files[-1], chunk) for chunk in planned.chunks]
                    self.redone.append(planned.name)
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                for each in open_files:
                    each.close()
                self.workspace.abandon()
                raise
        return dict(self._digests)

    def plan_digest(self) -> str:
        """Return a digest of the names, the sizes and the fixed bytes of all files."""
        total = hashlib.sha256()
        for planned in self.files:
            total.update(repr((planned.name, planned.num_bytes)).encode())
            for position, data in planned.fixed:
                total.update(b"%d %d " % (position, len(data)) + data)
        return total.hexdigest()

    def _convert(self, target: _OpenFile, chunk: Chunk) -> None:
        dtype = chunk.dtype if chunk.scales is None else torch.bfloat16
        values = self._memory(chunk.shape, dtype, chunk.position)
        if sum(math.prod(p.source.shape) for p in chunk.pieces) < values.numel():
            values.zero_()  # the padding of a vocabulary
        for piece in chunk.pieces:
            self.source.read_into(piece.source, values[piece.index])
        try:
            if chunk.scales is None:
                target.write(chunk.position, values)
            else:
                codes, scales = self._codec().encode(chunk, values)
                target.write(chunk.position, codes)
                target.write(chunk.scales, scales)
                values = self._codec().decode(codes, scales)
            self._end_chunk(target, _digests_of(chunk, values))
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            held = ", ".join(sorted({str(p.source) for p in chunk.pieces}))
            raise UserError(
                f"{self.workspace.folder}: no space left for {target.planned.name} ({error.strerror}) at {held[:300]},"
                f" which are a chunk of shape {chunk.shape}",
                remedy="free space and repeat the command: complete files are kept",
            ) from None

    def _end_chunk(self, target: _OpenFile, digests: dict[str, int]) -> None:
        found = target.end_chunk(digests)
        if found is not None:
            with self._lock:
                _add(self._digests, found)

    def _is_complete(self, planned: PlannedFile, pool: ThreadPoolExecutor) -> bool:
        """Return True if the file exists and its chunks, which are read again, have the digests of its record."""
        path, record = self.workspace.result / planned.name, self.workspace.record(planned.name)
        if not record.is_file() or not path.is_file() or path.stat().st_size != planned.num_bytes:
            return False
        recorded: dict[str, int] = json.loads(record.read_text())
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if any(os.pread(descriptor, len(data), position) != data for position, data in planned.fixed):
                return False
            found: dict[str, int] = defaultdict(int)
            for digests in pool.map(lambda chunk: self._digests_on_disk(descriptor, chunk), planned.chunks):
                _add(found, digests)
        except ShortFileError:
            return False
        finally:
            os.close(descriptor)
        if dict(found) != recorded:
            return False
        _add(self._digests, recorded)
        return True

    def _digests_on_disk(self, descriptor: int, chunk: Chunk) -> dict[str, int]:
        values = self._memory(chunk.shape, chunk.dtype)
        read_slice(descriptor, chunk.position, chunk.shape, (0,) * len(chunk.shape), values)
        if chunk.scales is not None:
            scales = torch.empty(self._codec().scales_shape(chunk.shape))
            read_slice(descriptor, chunk.scales, tuple(scales.shape), (0, 0), scales)
            values = self._codec().decode(values, scales)
        return _digests_of(chunk, values)

    def _codec(self) -> ChunkCodec:
        assert self.codec is not None, "a chunk with scales needs the codec that makes them"
        return self.codec

    def _memory(self, shape: Shape, dtype: torch.dtype, position: int = 0) -> Tensor:
        """Return the worker's buffer, which is reused for every chunk because new pages cost as much as copying.

        Its offset within a block of memory is that of `position` within a block of the file.
        """
        size = math.prod(shape) * dtype.itemsize
        held: Tensor | None = getattr(self._arena, "bytes", None)
        if held is None or held.numel() < size + BLOCK_BYTES:
            held = self._arena.bytes = torch.empty(size + BLOCK_BYTES, dtype=torch.uint8)
        shift = (position - held.data_ptr()) % BLOCK_BYTES // dtype.itemsize * dtype.itemsize
        return held[shift : shift + size].view(dtype).view(shape)


class _OpenFile:
    """A file that several workers write under a temporary name.

    Whole blocks bypass the page cache if the file system supports direct writes. The output is not read again soon,
    pages for it cost more than writing, and the cache of a login node stays free for others. Partial blocks are written
    through the page cache.
    """

    def __init__(self, workspace: Workspace, planned: PlannedFile) -> None:
        self.planned, self._path = planned, workspace.result / planned.name
        self._record = workspace.record(planned.name)
        self._temporary = self._path.with_name(self._path.name + ".tmp")
        self._descriptor: int | None = None
        self._direct: int | None = None
        self._left = len(planned.chunks)
        self._digests: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # a second writer of one file would busy-wait in the kernel

    def write(self, position: int, values: Tensor) -> None:
        usual, direct = self._open()
        data = tensor_memory(values)
        begin, end = (0, 0) if direct is None else write_blocks(direct, data, values.data_ptr(), position)
        with self._writing:
            write_all(usual, data[:begin], position)
            write_all(usual, data[end:], position + end)

    def end_chunk(self, digests: dict[str, int]) -> dict[str, int] | None:
        """Count a finished chunk; after the last one, rename the complete file and return its digests."""
        with self._lock:
            _add(self._digests, digests)
            self._left -= 1
            if self._left:
                return None
        descriptor, _ = self._open()
        for position, data in self.planned.fixed:
            write_all(descriptor, data, position)
        os.fsync(descriptor)
        self.close()
        self._temporary.rename(self._path)
        write_text(self._record, json.dumps(self._digests))
        return self._digests

    def close(self) -> None:
        with self._lock:
            for descriptor in (self._descriptor, self._direct):
                if descriptor is not None:
                    os.close(descriptor)
            self._descriptor = self._direct = None

    def _open(self) -> tuple[int, int | None]:
        with self._lock:
            if self._descriptor is None:
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                self._descriptor = os.open(self._temporary, flags, 0o666)
                os.ftruncate(self._descriptor, self.planned.num_bytes)
                self._direct = _open_direct(self._temporary)
            return self._descriptor, self._direct


def _open_direct(path: Path) -> int | None:
    """Open a file for direct writes; return None if they are not supported."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return None


def _digests_of(chunk: Chunk, values: Tensor) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for piece in chunk.pieces:
        _add(found, {piece.source.name: slice_digest(values[piece.index], piece.source)})
    return dict(found)


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for name, digest in more.items():
        total[name] = wrap_int64(total.get(name, 0) + digest)


def copy_side_files(base: Path, folder: Path) -> None:
    """Copy the files of a model folder that are not weights: config, tokenizer and others."""
    for path in base.iterdir():
        if path.is_file() and path.suffix not in _WEIGHT_FILES and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)  # without its mode, because the copy may have to be changed


def identity_of(folder: Path, *options: object) -> str:
    """Return a text that changes if a file of the input or an option changes."""
    files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file())
    return repr((str(folder.absolute()), files, options))

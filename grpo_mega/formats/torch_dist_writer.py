"""Plan of the files of a `torch_dist` checkpoint, and its metadata, in the format of Megatron's loader."""

from __future__ import annotations

import functools
import io
import json
import math
import pickle
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from grpo_mega.formats.byte_ranges import Shape
from grpo_mega.formats.megatron_keys import MegatronTensor
from grpo_mega.formats.planned_files import Chunk, PlannedFile, SliceCopy, pieces_within, rows_at_once

_ALIGNMENT = 64  # bytes; a record starts at a multiple of it, and so do the values within a record of `torch.save`
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class DistPlan:
    """The files of a checkpoint that is being planned; every chunk of a tensor is one `torch.save` record."""

    def __init__(self, folder: str, file_bytes: int) -> None:
        """Start a plan whose file names begin with `folder`; a new file begins after `file_bytes`."""
        self.files: list[PlannedFile] = []
        self._folder, self._file_bytes = folder, file_bytes
        self._chunks: list[Chunk] = []
        self._fixed: list[tuple[int, bytes]] = []
        self._end = 0
        self._tensors: dict[str, Any] = {}
        self._storage: dict[dcp.MetadataIndex, filesystem._StorageInfo] = {}

    def add_object(self, keys: Sequence[str], value: Any) -> None:
        """Add one pickled object under several keys; its bytes are stored once."""
        buffer = io.BytesIO()
        torch.save(value, buffer)
        info = self._place(buffer.getvalue(), 0, b"")
        for key in keys:
            self._tensors[key] = dcp.BytesStorageMetadata()
            self._storage[dcp.MetadataIndex(key)] = info

    def add(self, tensor: MegatronTensor, dtype: torch.dtype) -> None:
        """Add a tensor in chunks of rows."""
        pieces = [SliceCopy(p.hf, p.local.offsets) for p in tensor.placements]
        step = rows_at_once(tensor.shape, dtype)
        for row in range(0, tensor.shape[0], step):
            shape = (min(step, tensor.shape[0] - row), *tensor.shape[1:])
            begin = (row, *(0,) * (len(shape) - 1))
            stored = (*(1,) * len(tensor.leading), *shape)
            before, after = envelope(stored, dtype)
            info = self._place(before, math.prod(shape) * dtype.itemsize, after)
            position = info.offset + len(before)
            self._chunks.append(Chunk(position, shape, dtype, tuple(pieces_within(pieces, begin, shape))))
            for key in (tensor.key, *tensor.also):
                self._describe(key, tensor, dtype, (*tensor.leading, *begin), stored, info)
            if self._end >= self._file_bytes:
                self._close_file()

    def finish(self) -> list[PlannedFile]:
        """Return the plans of all files."""
        if self._chunks or self._fixed:
            self._close_file()
        return self.files

    def write_metadata(self, folder: Path, args: Namespace, save_id: str) -> None:
        """Write `.metadata`, `metadata.json` and `common.pt`; the same input gives the same bytes."""
        meta = dcp.Metadata(
            state_dict_metadata=self._tensors,
            storage_data=self._storage,
            storage_meta=dcp.StorageMeta(save_id=save_id),
        )
        (folder / ".metadata").write_bytes(pickle.dumps(meta))
        (folder / "metadata.json").write_text(json.dumps(_CONFIG))
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": args.iteration}, folder / "common.pt")

    def _describe(
        self,
        key: str,
        tensor: MegatronTensor,
        dtype: torch.dtype,
        offsets: Shape,
        shape: Shape,
        info: filesystem._StorageInfo,
    ) -> None:
        if key not in self._tensors:
            size = torch.Size((*tensor.leading_sizes, *tensor.shape))
            self._tensors[key] = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), size, [])
        chunk = dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        self._tensors[key].chunks.append(chunk)
        self._storage[dcp.MetadataIndex(key, chunk.offsets)] = info

    def _place(self, before: bytes, num_bytes: int, after: bytes) -> filesystem._StorageInfo:
        begin = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._end = begin + len(before) + num_bytes + len(after)
        self._fixed += [(begin, before), (self._end - len(after), after)]
        return filesystem._StorageInfo(self._name, begin, self._end - begin)

    def _close_file(self) -> None:
        name = f"{self._folder}/{self._name}"
        self.files.append(PlannedFile(name, self._end, tuple(self._chunks), tuple(self._fixed)))
        self._chunks, self._fixed, self._end = [], [], 0

    @property
    def _name(self) -> str:
        return f"__0_{len(self.files)}.distcp"


@functools.lru_cache(maxsize=4096)
def envelope(shape: Shape, dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Return the bytes that `torch.save` of a contiguous tensor writes before and after its values.

    The checksum of the record stays zero, as with `torch.serialization.set_crc32_options(False)`; `torch.load` does not
    check it.
    """
    sink = _EnvelopeFile()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), sink)  # type: ignore[arg-type] # torch.save uses only these methods
    assert sink.gap is not None, f"torch.save of {shape} {dtype} did not skip the values"
    return bytes(sink.before), bytes(sink.after)


class _EnvelopeFile(io.RawIOBase):
    """File object that keeps the bytes written before and after the one skipped range."""

    def __init__(self) -> None:
        self.before, self.after = bytearray(), bytearray()
        self.gap: int | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        (self.before if self.gap is None else self.after).extend(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == io.SEEK_CUR, "torch.save skips data by a relative seek"
        assert self.gap is None, "torch.save skipped two ranges"
        self.gap = offset
        return len(self.before) + offset

    def tell(self) -> int:
        return len(self.before) + (self.gap or 0) + len(self.after)

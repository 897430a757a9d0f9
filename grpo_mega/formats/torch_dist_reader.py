"""Reader of checkpoints in Megatron's `torch_dist` format, without Megatron and without a process group.

Such a folder has `.metadata` (a pickle that maps each chunk of a tensor to a file), `metadata.json`, `common.pt` and
`*.distcp` files, in which every chunk is one `torch.save`. This module reads byte ranges, so a slice costs its own
bytes. torch's own reader (torch.distributed.checkpoint) loads whole chunks. Conversions would then exceed their memory
limit: a chunk can be as large as the largest tensor (docs/decisions/layout.md). Pickles are read by allow-lists
(allowed_pickles.py), so no code in them runs. Asserted by tests/e2e/test_convert_tools.py, test_convert_bad_input.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import threading
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp

from grpo_mega.formats.allowed_pickles import load_metadata
from grpo_mega.formats.byte_ranges import Shape, ShortFileError, read_slice
from grpo_mega.types import TensorSlice, UserError

LATEST = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class StoredChunk:
    """One slice of a tensor, saved by `torch.save` in bytes `begin` to `begin + num_bytes` of a file."""

    offsets: Shape
    shape: Shape
    path: Path
    begin: int
    num_bytes: int


@dataclass(frozen=True)
class DistTensor:
    """One tensor of the checkpoint, and its chunks."""

    dtype: torch.dtype
    shape: Shape
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class _Item:
    """Location of the values of a chunk."""

    position: int
    dtype: torch.dtype
    stride: Shape
    num_elements: int


class TorchDistFiles:
    """The tensors of one checkpoint by Megatron's names. Several threads can use one reader."""

    def __init__(self, folder: Path, files: Collection[Path] | None = None) -> None:
        """Read `.metadata` of `folder`.

        Args:
            folder: the checkpoint.
            files: those that will be read, if the others are not written yet; default: all.

        Raises:
            UserError: it is damaged or has another format, or a file is missing or too short.
        """
        self.folder = folder
        self.tensors = _read_metadata(folder)
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        self._items: dict[tuple[Path, int], _Item] = {}
        ends: dict[Path, int] = {}
        for name, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                if files is not None and chunk.path not in files:
                    continue
                if chunk.path not in ends:
                    ends[chunk.path] = chunk.path.stat().st_size if chunk.path.is_file() else -1
                if chunk.begin + chunk.num_bytes > ends[chunk.path]:
                    found = "was not found" if ends[chunk.path] < 0 else f"has {ends[chunk.path]} bytes"
                    raise UserError(
                        f"{chunk.path}: {found}; {name} of shape {tensor.shape} has its part of shape {chunk.shape} at"
                        f" bytes {chunk.begin}:{chunk.begin + chunk.num_bytes}",
                        remedy="copy the checkpoint again",
                    )

    def close(self) -> None:
        """Close all files; nothing can be read afterwards."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def check(self, name: str) -> None:
        """Check that the chunks of a tensor are inside it, have different offsets, and have as many values as it.

        Raises:
            UserError: they do not.
        """
        tensor = self.tensors[name]
        remedy = "copy the checkpoint again"
        for chunk in tensor.chunks:
            ends = [o + n for o, n in zip(chunk.offsets, chunk.shape, strict=True)]
            if min((*chunk.offsets, *chunk.shape, chunk.begin, chunk.num_bytes)) < 0 or any(
                end > size for end, size in zip(ends, tensor.shape, strict=True)
            ):
                raise UserError(
                    f"{self.folder / '.metadata'}: {name} of shape {tensor.shape} has a part of shape {chunk.shape} at"
                    f" {chunk.offsets}, outside of it",
                    remedy=remedy,
                )
        offsets = [chunk.offsets for chunk in tensor.chunks]
        if len(set(offsets)) < len(offsets):
            twice = collections.Counter(offsets).most_common(1)[0][0]
            raise UserError(
                f"{self.folder / '.metadata'}: {name} of shape {tensor.shape} has two parts at {twice}, of shape"
                f" {tensor.chunks[offsets.index(twice)].shape}",
                remedy=remedy,
            )
        held, due = sum(math.prod(chunk.shape) for chunk in tensor.chunks), math.prod(tensor.shape)
        if held != due:
            raise UserError(
                f"{self.folder / '.metadata'}: {name} of shape {tensor.shape} has {due} numbers, its parts of shapes"
                f" {[c.shape for c in tensor.chunks[:3]]} (of {len(tensor.chunks)}) have {held}",
                remedy=remedy,
            )

    def read_into(self, box: TensorSlice, out: Tensor) -> None:
        """Fill `out`, which has any floating-point dtype, with a slice.

        Raises:
            UserError: the chunks do not hold the whole slice.
        """
        tensor, filled = self.tensors[box.name], 0
        for chunk in tensor.chunks:
            low = tuple(max(a, b) for a, b in zip(chunk.offsets, box.offsets, strict=True))
            high = tuple(
                min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.shape, box.offsets, box.shape, strict=True)
            )
            if all(lo < hi for lo, hi in zip(low, high, strict=True)):
                region = out[tuple(slice(lo - b, hi - b) for lo, hi, b in zip(low, high, box.offsets, strict=True))]
                self.read_chunk(
                    box.name, chunk, tuple(lo - a for lo, a in zip(low, chunk.offsets, strict=True)), region
                )
                filled += region.numel()
        if filled != out.numel():
            raise UserError(
                f"{self.folder}: of {box.name} {tensor.shape} the chunks hold {filled} of the {out.numel()} numbers at"
                f" {box}",
                remedy="copy the checkpoint again",
            )

    def read_chunk(self, name: str, chunk: StoredChunk, offsets: Shape, out: Tensor) -> None:
        """Fill `out`, in host memory, with the values at `offsets` in a chunk of tensor `name`.

        Raises:
            UserError: the chunk cannot be read.
        """
        descriptor = self._descriptor(chunk.path)
        item = self._item(name, chunk, descriptor)
        same = item.dtype == out.dtype
        try:
            if item.stride == _row_major(chunk.shape):
                values = out if same else torch.empty(out.shape, dtype=item.dtype)
                read_slice(descriptor, item.position, chunk.shape, offsets, values)
            else:  # a transposed tensor is saved with its strides
                flat = torch.empty(item.num_elements, dtype=item.dtype)
                read_slice(descriptor, item.position, (item.num_elements,), (0,), flat)
                whole = flat.as_strided(chunk.shape, item.stride)
                values = whole[tuple(slice(o, o + n) for o, n in zip(offsets, out.shape, strict=True))]
        except ShortFileError as error:
            raise UserError(
                f"{chunk.path}: {name} cannot be read ({error})", remedy="copy the checkpoint again"
            ) from None
        if values is not out:
            out.copy_(values)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path]

    def _item(self, name: str, chunk: StoredChunk, descriptor: int) -> _Item:
        key = chunk.path, chunk.begin
        with self._lock:
            found = self._items.get(key)
        if found is None:
            try:
                found = _read_item(descriptor, chunk)
            except Exception as error:  # a damaged archive or pickle raises anything
                raise UserError(
                    f"{chunk.path}: {name}, part of shape {chunk.shape} at byte {chunk.begin}, cannot be read"
                    f" ({type(error).__name__}: {error})",
                    remedy="copy the checkpoint again",
                ) from None
            tensor = self.tensors[name]
            if found.dtype != tensor.dtype:
                raise UserError(
                    f"{chunk.path}: {name}, part of shape {chunk.shape}, has dtype {found.dtype}, .metadata says"
                    f" {tensor.dtype} for all of shape {tensor.shape}",
                    remedy="copy the checkpoint again",
                )
            with self._lock:
                self._items[key] = found
        return found


def checkpoint_folder(folder: Path) -> Path | None:
    """Return the folder with `.metadata`: `folder`, or the one that its latest_checkpointed_iteration.txt names.

    Returns None if `folder` is not a checkpoint.

    Raises:
        UserError: the named folder is not a checkpoint.
    """
    if (folder / ".metadata").is_file():
        return folder
    if not (folder / LATEST).is_file():
        return None
    latest = (folder / LATEST).read_bytes().decode(errors="replace").strip()
    named = folder / (latest if latest == "release" else f"iter_{int(latest) if latest.isdecimal() else 0:07d}")
    if not (named / ".metadata").is_file():
        raise UserError(
            f"{folder / LATEST}: names {latest}, but {named} has no .metadata", remedy="copy the checkpoint again"
        )
    return named


def _read_metadata(folder: Path) -> dict[str, DistTensor]:
    path = folder / ".metadata"
    found = load_metadata(path.read_bytes(), path)
    try:
        return {
            name: _tensor_of(name, entry, found.storage_data, folder)
            for name, entry in found.state_dict_metadata.items()
            if isinstance(entry, dcp.TensorStorageMetadata)
        }
    except UserError:
        raise
    except Exception as error:  # a damaged pickle holds anything
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error})", remedy="copy the checkpoint again"
        ) from None


def _tensor_of(name: str, entry: dcp.TensorStorageMetadata, storage: dict[Any, Any], folder: Path) -> DistTensor:
    chunks = []
    for chunk in entry.chunks:
        info = storage[dcp.MetadataIndex(name, chunk.offsets)]
        path = folder / info.relative_path
        if path.parent != folder or info.transform_descriptors:
            raise UserError(f"{folder / '.metadata'}: {name} lies in {info.relative_path}, transformed or elsewhere")
        extent = tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes))
        chunks.append(StoredChunk(*extent, path, int(info.offset), int(info.length)))
    return DistTensor(entry.properties.dtype, tuple(map(int, entry.size)), tuple(chunks))


class _ItemUnpickler(pickle.Unpickler):
    """Unpickler of the `data.pkl` of a saved tensor; it returns (storage, offset, shape, stride)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: (storage, offset, tuple(shape), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"contains {module}.{name}, which is not part of a plain tensor")

    def persistent_load(self, saved: Any) -> Any:
        _, dtype, key, _, count = saved
        return dtype, key, count


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _read_item(descriptor: int, chunk: StoredChunk) -> _Item:
    window = _FileWindow(descriptor, chunk.begin, chunk.num_bytes)
    with zipfile.ZipFile(window) as archive:
        root = archive.namelist()[0].split("/")[0]
        (dtype, key, count), offset, shape, stride = _ItemUnpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
        data = archive.getinfo(f"{root}/data/{key}")
    if data.compress_type != zipfile.ZIP_STORED or data.file_size != count * dtype.itemsize:
        raise ValueError(f"{count} numbers of {dtype} in {data.file_size} bytes")
    if shape != chunk.shape:
        raise ValueError(f"it has shape {shape}")
    last = offset + sum(s * (n - 1) for s, n in zip(stride, shape, strict=True))
    if offset < 0 or min(stride, default=0) < 0 or (math.prod(shape) and last >= count):
        raise ValueError(f"shape {shape} and stride {stride} need more than {count} numbers")
    window.seek(data.header_offset)
    local = window.read(30)  # lengths of name and extra field can differ from those in the directory
    skip = 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if data.header_offset + skip + data.file_size > chunk.num_bytes:
        raise ValueError("its values end after the chunk")
    position = chunk.begin + data.header_offset + skip + offset * dtype.itemsize
    return _Item(position, dtype, _normalized_stride(shape, stride), count - offset)


def _row_major(shape: Shape) -> Shape:
    strides, size = [], 1
    for n in reversed(shape):
        strides.append(size)
        size *= max(1, n)
    return tuple(reversed(strides))


def _normalized_stride(shape: Shape, stride: Shape) -> Shape:
    """Return the stride with the row-major value for dimensions of size 1, whose stride has no meaning."""
    return tuple(s if n != 1 else r for n, s, r in zip(shape, stride, _row_major(shape), strict=True))


class _FileWindow(io.RawIOBase):
    """A part of a file as a file object; it does not move the descriptor, which several threads share."""

    def __init__(self, descriptor: int, begin: int, size: int) -> None:
        self._descriptor, self._begin, self._size, self._at = descriptor, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = os.pread(self._descriptor, left if size is None or size < 0 else min(size, left), self._begin + self._at)
        self._at += len(data)
        return data

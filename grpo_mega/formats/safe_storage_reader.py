"""Reader of `torch_dist` files for torch.distributed.checkpoint, without torch's unrestricted unpickling.

torch's `FileSystemReader` reads `.metadata` by `pickle.load` (filesystem.py:930), and its planner loads objects by
`torch.load(weights_only=False)` (default_planner.py:387). This reader unpickles `.metadata` by an allow-list. It
replaces the bytes of every object by a copy that it has read by an allow-list and pickled itself, so what the planner
loads was never in the file. Tensors are read by torch_dist_reader.py, which unpickles their shape by an allow-list.
Asserted by tests/parallel/test_hostile_checkpoint.py.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageReaderTransforms
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from grpo_mega.formats.allowed_pickles import load_metadata, load_values, reason_of
from grpo_mega.formats.torch_dist_reader import StoredChunk, TorchDistFiles
from grpo_mega.types import UserError

_READERS = 4
_ITEMS_AT_ONCE = 64  # a quantized tensor of Transformer Engine has a buffer until its item is committed


class SafeStorageReader(FileSystemReader):
    """Storage reader of one checkpoint folder that runs no code of the checkpoint."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._folder = Path(path)
        self.transforms = _CheckedObjects(self._folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the content of `.metadata`.

        Raises:
            UserError: it is missing, damaged, contains a class that is not part of the format, or names a file outside
                of the folder.
        """
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        found = load_metadata(path.read_bytes(), path)
        for info in (found.storage_data or {}).values():
            if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
                raise UserError(
                    f"{path}: names {info.relative_path!r}, which is outside of the folder or transformed",
                    remedy="copy the checkpoint again, or use another one",
                )
        found.storage_meta = getattr(found, "storage_meta", None) or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors and objects.

        torch loads the whole stored tensor of each item (filesystem.py:899) and copies a part of it. Here its bytes are
        read from the file to where they belong, by several threads.

        Raises:
            UserError: a file is missing, too short, or damaged.
        """
        objects = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        try:
            with closing(TorchDistFiles(self._folder)) as files, ThreadPoolExecutor(_READERS) as pool:
                chunks = {(name, chunk.offsets): chunk for name, each in files.tensors.items() for chunk in each.chunks}

                def read(item: ReadItem, target: Tensor) -> None:
                    index = item.storage_index
                    _read_item(files, chunks[index.fqn, tuple(index.offset or ())], item, target)

                for start in range(0, len(tensors), _ITEMS_AT_ONCE):
                    items = tensors[start : start + _ITEMS_AT_ONCE]
                    targets = [planner.resolve_tensor(item).detach() for item in items]
                    list(pool.map(read, items, targets))
                    for item, target in zip(items, targets, strict=True):
                        planner.commit_tensor(item, target)
            return super().read_data(dataclasses.replace(plan, items=objects), planner)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, AssertionError) as error:
            raise UserError(
                f"{self._folder}: a shard cannot be read ({type(error).__name__}: {reason_of(error)})",
                remedy="copy the checkpoint again, or use another one",
            ) from error


def _read_item(files: TorchDistFiles, chunk: StoredChunk, item: ReadItem, target: Tensor) -> None:
    """Fill `target`, on any device, with the part of a stored chunk that `item` names."""
    name = item.storage_index.fqn
    assert tuple(target.shape) == tuple(item.lengths), f"{name}: {tuple(target.shape)} for {tuple(item.lengths)}"
    values = target if target.is_cpu else torch.empty(target.shape, dtype=target.dtype, device="cpu")
    files.read_chunk(name, chunk, tuple(item.storage_offsets), values)
    if values is not target:
        target.copy_(values)


class _CheckedObjects(_StorageReaderTransforms):
    """Hands tensors on as they are, and objects as bytes that were pickled here."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def transform_load_stream(
        self, read_item: ReadItem, transform_descriptors: Sequence[str], raw_stream: IO[bytes]
    ) -> IO[bytes]:
        if read_item.type != LoadItemType.BYTE_IO:
            return raw_stream
        value = load_values(raw_stream.read(-1), f"{self._folder}: {read_item.storage_index.fqn}")
        own = io.BytesIO()
        torch.save(value, own)
        own.seek(0)
        return own

"""Reader of `torch_dist` files for torch.distributed.checkpoint, without torch's unrestricted unpickling.

torch's `FileSystemReader` reads `.metadata` by `pickle.load` (filesystem.py:930), and its planner loads objects by
`torch.load(weights_only=False)` (default_planner.py:387). This reader unpickles `.metadata` by an allow-list. It
replaces the bytes of every object by a copy that it has read by an allow-list and pickled itself, so what the planner
loads was never in the file. Tensors are loaded by torch with `weights_only=True`.
Asserted by tests/parallel/test_hostile_checkpoint.py.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageReaderTransforms
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from grpo_mega.formats.allowed_pickles import load_metadata, load_values, reason_of
from grpo_mega.types import UserError


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

        Raises:
            UserError: a file is missing, too short, or damaged.
        """
        try:
            return super().read_data(plan, planner)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, AssertionError) as error:
            raise UserError(
                f"{self._folder}: a shard cannot be read ({type(error).__name__}: {reason_of(error)})",
                remedy="copy the checkpoint again, or use another one",
            ) from error


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

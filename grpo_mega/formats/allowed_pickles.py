"""Unpicklers of checkpoint files that construct only the classes of the format, so that no code in a file runs.

`.metadata` is one pickle. Objects (`common.pt`, and the records of a shard that are not tensors) are written by
`torch.save`; torch's own allow-list unpickler reads them, whatever the environment says about it. Every reader of
checkpoints in this project uses these functions: the converters (torch_dist_reader.py) and, in place of the pickle
calls of Megatron-Core and torch, the trainer (safe_storage_reader.py).
Asserted by tests/unit/formats/test_allowed_pickles.py and tests/parallel/test_hostile_checkpoint.py.
"""

from __future__ import annotations

import collections
import enum
import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as dcp

from grpo_mega.types import UserError


def load_metadata(data: bytes, path: object) -> dcp.Metadata:
    """Return the content of `.metadata`. `path` appears in the error.

    Raises:
        UserError: it is damaged, or contains a class that is not part of the format (names it).
    """
    try:
        found: dcp.Metadata = MetadataUnpickler(io.BytesIO(data)).load()
        if not all(isinstance(part, dict) for part in (found.state_dict_metadata, found.storage_data)):
            raise pickle.UnpicklingError("has no tables of tensors and files")
    except Exception as error:  # a damaged pickle raises anything
        raise _not_readable(path, error) from None
    return found


def load_values(data: bytes, path: object) -> Any:
    """Return an object of plain values and tensors that `torch.save` wrote. `path` appears in the error.

    Raises:
        UserError: it is damaged, or contains a class that is not allowed (names it).
    """
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle raises anything
        raise _not_readable(path, error) from None


def reason_of(error: BaseException) -> str:
    """Return the first line of an error of torch without its advice, which would mean to trust the file."""
    advice = ("Weights only load failed", "Please file an issue", "Check the documentation")
    before, _, after = str(error).partition("WeightsUnpickler error:")
    lines = (" ".join(line.split()) for line in (after or before).splitlines())
    return next((line for line in lines if line and not line.startswith(advice)), "it ends too early")


def _not_readable(path: object, error: Exception) -> UserError:
    return UserError(
        f"{path}: cannot be read ({type(error).__name__}: {reason_of(error)})",
        remedy="copy the checkpoint again, or use another one",
    )


class _IgnoredObject:
    """Placeholder of Megatron's own classes in checkpoints of versions before 0.16; only their tensors are used."""


def _enum_member(kind: Any, name: str) -> Any:
    """Return a member of an enumeration; early releases of Python 3.11 pickle it as getattr(class, name)."""
    if not isinstance(kind, type) or not issubclass(kind, enum.Enum):
        raise pickle.UnpicklingError(f"contains {name!r} of {kind!r}, which is not part of the format")
    return kind[name]


_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (dcp.__name__, name): getattr(dcp, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    **{
        (planner.__name__, name): getattr(planner, name)
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "getattr"): _enum_member,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _IgnoredObject,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _IgnoredObject,
}


class MetadataUnpickler(pickle.Unpickler):
    """Unpickler that accepts only the classes of the format."""

    def find_class(self, module: str, name: str) -> Any:
        known = _METADATA_CLASSES.get((module, name))
        if known is not None:
            return known
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"contains {module}.{name}, which is not part of the format")

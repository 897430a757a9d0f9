"""Writer of checkpoints in Megatron's format that copies nothing that does not have to be copied, on every machine.

Megatron's writer is made for asynchronous saves. Before it writes, it copies everything that a rank saves to host
memory: tensors on the device (strategies/filesystem_async.py:230) and views of host memory (:157). Then `torch.save`
computes the checksum of each tensor, which no loader checks, and writes in small blocks. This writer hands the content
of a file to `types.FileSink`, which writes it at once (formats/file_parts.py: one tensor at a time is copied) or
copies it and writes it while training continues. Positions in the files are known before anything is written, so
Megatron's metadata is complete when a save returns. The files have the same bytes as Megatron's without checksums.

Megatron's own asynchronous saves are not used: nvidia-resiliency-ext 0.6.0 is not on the package index, and the caller
`mcore` (strategies/async_utils.py:273) is deprecated, forks a process with threads, and reports a dead one only by an
empty queue at the end.
Asserted by tests/unit/policy/megatron_patches/test_checkpoint_writing.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import _wrap_exception
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from grpo_mega.formats.file_parts import DirectFiles
from grpo_mega.formats.torch_dist_writer import envelope
from grpo_mega.policy.megatron_patches import cpu
from grpo_mega.types import FileSink

cpu.prepare_import()

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402 - only after prepare_import

_sink: FileSink | None = None


def install() -> None:
    """Replace Megatron's writer, which a save takes from its module. Idempotent."""
    filesystem_async.FileSystemWriterAsync = PlannedWriter


@contextmanager
def writing_to(sink: FileSink | None) -> Iterator[None]:
    """Hand the files of saves inside the block to `sink`. None: they are written at once, and on disk at the end."""
    global _sink
    before = _sink
    _sink = sink or before
    try:
        yield
    finally:
        _sink = before


class PlannedWriter(filesystem_async.FileSystemWriterAsync):
    """Megatron's writer with a sink for the content of its files."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Assign the items of this rank to its files, as filesystem_async.py:111 does, and compute their positions."""
        if self.separation_hint is not None:
            raise NotImplementedError(f"separation_hint={self.separation_hint}: files by prefix are not written")
        self.write_buckets: list[Any] = []
        self._results: list[WriteResult] = []
        self._error: Exception | None = None
        for items in filesystem_async._split_by_size_and_type(self.thread_count, plan.items):
            if items:
                name = f"{plan.storage_data.prefix}{len(self.write_buckets)}{DEFAULT_SUFFIX}"
                parts, results = file_content(items, planner, name)
                self.write_buckets.append((Path(self.checkpoint_dir) / name, parts))
                self._results += results

    def get_save_function_and_args(self) -> tuple[Callable[[], None] | None, None, list[Any]]:
        """Return the function that hands the files to the sink; it has no arguments, and there is no second copy."""
        return (self._hand_over if self.write_buckets else None), None, []

    def retrieve_write_results(self) -> Any:
        """Return the positions of the items, or the error of the sink in the form that Megatron expects."""
        return self._results if self._error is None else _wrap_exception(self._error)

    def _hand_over(self) -> None:
        files = _sink or DirectFiles()
        try:
            for path, parts in self.write_buckets:
                files.add_file(path, parts)
            if _sink is None:
                files.flush()
        except (OSError, RuntimeError) as error:  # the finalization raises it on all ranks
            self._error = RuntimeError(f"{type(error).__name__}: {error}")


def file_content(
    items: Sequence[WriteItem], planner: SavePlanner, name: str
) -> tuple[list[bytes | Tensor], list[WriteResult]]:
    """Return the parts of a file, objects first, and the position of each item in it."""
    objects = [item for item in items if item.type == WriteItemType.BYTE_IO]
    tensors = [item for item in items if item.type != WriteItemType.BYTE_IO]
    parts: list[bytes | Tensor] = []
    results: list[WriteResult] = []
    end = 0
    for item in (*objects, *tensors):
        data = planner.resolve_data(item)
        own: list[bytes | Tensor] = [data.getvalue()] if isinstance(data, io.BytesIO) else _saved_tensor(data.detach())
        length = sum(len(part) if isinstance(part, bytes) else part.nbytes for part in own)
        parts += own
        results.append(WriteResult(item.index, length, _StorageInfo(name, end, length)))
        end += length
    return parts, results


def _saved_tensor(tensor: Tensor) -> list[bytes | Tensor]:
    """Return what `torch.save` writes for a contiguous copy of the tensor."""
    if not tensor.numel():
        empty = io.BytesIO()
        torch.save(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"), empty)
        return [empty.getvalue()]
    before, after = envelope(tuple(tensor.shape), tensor.dtype)
    return [before, tensor, after]

"""A checkpoint is written with one copied tensor of a rank in host memory, on every machine.

Megatron's writer is made for asynchronous saves. Before it writes, it copies everything that a rank saves to host
memory: tensors on the device (strategies/filesystem_async.py:230) and views of host memory (:157). That is 14 bytes per
parameter of a bf16 policy, next to the copies that offloading keeps. The saves of this project are synchronous, and
need a copy only while they write it. The files have the same bytes.
Asserted by tests/unit/policy/megatron_patches/test_checkpoint_writing.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from grpo_mega.policy.megatron_patches import cpu

cpu.prepare_import()

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402 - only after prepare_import


def install() -> None:
    """Replace Megatron's writer, which a save takes from its module. Idempotent."""
    filesystem_async.FileSystemWriterAsync = OneCopyWriter


class HostCopies:
    """Iterates over (item, its tensor in host memory). A copy is made when it is due, and freed before the next one.

    A tensor that fills its host memory is not copied. A view is: `torch.save` writes all of the memory behind it.
    """

    def __init__(self, tensors: list[tuple[WriteItem, Tensor]]) -> None:
        self._tensors = tensors

    def __iter__(self) -> Iterator[tuple[WriteItem, Tensor]]:
        """Yield in the order of the file."""
        for item, saved in self._tensors:
            tensor = saved.detach()
            if tensor.is_cpu and tensor.untyped_storage().size() == tensor.numel() * tensor.itemsize:
                yield item, tensor
                continue
            values = tensor.dequantize() if "dequantize" in type(tensor).__dict__ else tensor
            copy = values.clone() if values.is_cpu else values.cpu()
            yield item, copy
            copy.untyped_storage().resize_(0)  # the reader still refers to it while it asks for the next one


class OneCopyWriter(filesystem_async.FileSystemWriterAsync):
    """Megatron's writer without its copies before the write. It can only write synchronously."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Assign the items of this rank to its files, as filesystem_async.py:111 does, and copy nothing."""
        if self.separation_hint is not None:
            raise NotImplementedError(f"separation_hint={self.separation_hint}: files by prefix are not written")
        self.write_buckets: list[Any] = []
        for items in filesystem_async._split_by_size_and_type(self.thread_count, plan.items):
            if not items:
                continue
            name = f"{plan.storage_data.prefix}{len(self.write_buckets)}{DEFAULT_SUFFIX}"
            objects = [(item, planner.resolve_data(item)) for item in items if item.type == WriteItemType.BYTE_IO]
            tensors: list[Any] = [
                (item, planner.resolve_data(item)) for item in items if item.type != WriteItemType.BYTE_IO
            ]
            path = os.path.join(self.checkpoint_dir, name)
            self.write_buckets.append((path, name, (objects, HostCopies(tensors))))
        self.results_queue = filesystem_async.get_write_results_queue() if self.write_buckets else None

    @staticmethod
    def preload_tensors(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
        """Return the buckets as they are: their tensors are copied while they are written."""
        del non_blocking
        return write_buckets

"""A save copies one tensor at a time into host memory, and writes the files that Megatron's own writer writes."""

from __future__ import annotations

import dataclasses
import queue
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_mega.policy.megatron_patches import checkpoint_writing, fixes
from tests.helpers.unpatched_megatron import unpatched

from megatron.core.dist_checkpointing.strategies import filesystem_async  # isort: skip - after megatron_patches

SIZES = (30, 20, 50, 10)
"""Elements of the tensors to save, which are float32."""
COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)


class OnDevice(Tensor):
    """A tensor that says that it is on a CUDA device. Its values are on the host, and can only be copied there."""

    values: Tensor

    @staticmethod
    def __new__(cls: type[OnDevice], values: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(cls, values.size(), dtype=values.dtype, device="cuda")
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values)
        if func is torch.ops.aten.is_pinned.default:
            return False
        assert func is torch.ops.aten._to_copy.default, func
        assert kwargs["device"] == torch.device("cpu")
        return torch.clone(args[0].values)


class CopiedBytes(TorchDispatchMode):
    """Counts the bytes of copies: `total` of all, and `peak` of those that existed at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.peak = 0
        self._copies: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func in COPIES:
            self._copies.append(weakref.ref(result))
            self.total += result.nbytes
            alive = [copy for copy in (reference() for reference in self._copies) if copy is not None]
            self.peak = max(self.peak, sum(copy.untyped_storage().nbytes() for copy in alive))
        return result


def on_device() -> list[Tensor]:
    return [OnDevice(torch.arange(size, dtype=torch.float32)) for size in SIZES]


def views_on_host() -> list[Tensor]:
    return list(torch.arange(sum(SIZES), dtype=torch.float32).split(SIZES))


def whole_on_host() -> list[Tensor]:
    return [torch.arange(size, dtype=torch.float32) for size in SIZES]


def save(writers: Any, folder: Path, tensors: list[Tensor], threads: int = 1) -> CopiedBytes:
    """Write the tensors and an object with the writer of a module, as a synchronous save calls it."""
    folder.mkdir()
    planner = DefaultSavePlanner()
    state: dict[str, Any] = {str(i): each for i, each in enumerate(tensors)}
    planner.set_up_planner({**state, "object": [1, 2]}, is_coordinator=True)
    plan = dataclasses.replace(planner.create_local_plan(), storage_data=_StoragePrefix("__0_"))
    results: queue.Queue[Any] = queue.Queue()
    writer = writers.FileSystemWriterAsync(folder, thread_count=threads)
    with CopiedBytes() as copied:
        writer.prepare_write_data(plan, planner)
        buckets = writer.preload_tensors(writer.write_buckets, False)
        writer.write_preloaded_data_multithread([writer.transforms], False, 0, buckets, results)
    written = results.get_nowait()
    assert isinstance(written, dict), written
    assert sum(map(len, written.values())) == len(SIZES) + 1
    return copied


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron's module without the patch, and without the server process of its queue."""
    module = unpatched("dist_checkpointing.strategies.filesystem_async")
    monkeypatch.setattr(module, "get_write_results_queue", queue.Queue)
    return module


@pytest.mark.parametrize("make", [on_device, views_on_host])
def test_one_copy_at_a_time_is_in_host_memory(make: Any, tmp_path: Path) -> None:
    fixes.install()
    copied = save(filesystem_async, tmp_path / "saved", make())
    assert (copied.total, copied.peak) == (4 * sum(SIZES), 4 * max(SIZES))


@pytest.mark.parametrize("make", [on_device, views_on_host])
def test_megatron_copies_everything_before_it_writes_without_the_patch(make: Any, stock: Any, tmp_path: Path) -> None:
    copied = save(stock, tmp_path / "saved", make())
    assert copied.peak == copied.total == 4 * sum(SIZES)


def test_whole_tensors_of_the_host_are_not_copied(tmp_path: Path) -> None:
    fixes.install()
    assert save(filesystem_async, tmp_path / "saved", whole_on_host()).total == 0


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("make", [on_device, views_on_host, whole_on_host])
def test_the_files_are_those_of_megatrons_writer(make: Any, threads: int, stock: Any, tmp_path: Path) -> None:
    fixes.install()
    assert filesystem_async.FileSystemWriterAsync is checkpoint_writing.OneCopyWriter
    save(filesystem_async, tmp_path / "ours", make(), threads)
    save(stock, tmp_path / "stock", make(), threads)
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / each).iterdir()} for each in ("ours", "stock"))
    assert len(ours) == threads
    assert ours == theirs


def test_the_tensors_that_were_saved_are_unchanged(tmp_path: Path) -> None:
    fixes.install()
    for number, make in enumerate((views_on_host, whole_on_host)):
        tensors = make()
        save(filesystem_async, tmp_path / str(number), tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, make(), strict=True))

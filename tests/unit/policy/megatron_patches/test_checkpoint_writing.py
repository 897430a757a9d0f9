"""A save copies what it must into host memory, and writes the files that Megatron's own writer writes."""

from __future__ import annotations

import dataclasses
import io
import queue
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_mega.formats import file_parts
from grpo_mega.formats.torch_dist_writer import envelope
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
        if func is torch.ops.aten.view.default:
            return cls(args[0].values.view(*args[1:]))
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


def plan_of(writer: Any, tensors: list[Tensor]) -> None:
    """Let a writer of Megatron's plan the tensors and an object."""
    planner = DefaultSavePlanner()
    state: dict[str, Any] = {str(i): each for i, each in enumerate(tensors)}
    planner.set_up_planner({**state, "object": [1, 2]}, is_coordinator=True)
    plan = dataclasses.replace(planner.create_local_plan(), storage_data=_StoragePrefix("__0_"))
    writer.prepare_write_data(plan, planner)


def save(folder: Path, tensors: list[Tensor], threads: int = 1, sink: Any = None) -> tuple[CopiedBytes, list[Any]]:
    """Save the tensors and an object with the writer that is installed; return its copies and its results."""
    folder.mkdir()
    fixes.install()
    writer = filesystem_async.FileSystemWriterAsync(folder, thread_count=threads)
    assert isinstance(writer, checkpoint_writing.PlannedWriter)
    with CopiedBytes() as copied, checkpoint_writing.writing_to(sink):
        plan_of(writer, tensors)
        function, preload, arguments = writer.get_save_function_and_args()
        assert preload is None
        function(*arguments)
    return copied, writer.retrieve_write_results()


def save_stock(module: Any, folder: Path, tensors: list[Tensor], threads: int = 1) -> tuple[CopiedBytes, list[Any]]:
    """Do the same with Megatron's writer."""
    folder.mkdir()
    writer, results = module.FileSystemWriterAsync(folder, thread_count=threads), queue.Queue[Any]()
    with CopiedBytes() as copied:
        plan_of(writer, tensors)
        buckets = writer.preload_tensors(writer.write_buckets, False)
        writer.write_preloaded_data_multithread([writer.transforms], False, 0, buckets, results)
    written = results.get_nowait()
    return copied, [each for bucket in written.values() for each in bucket]


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron's module without the patch, and without the server process of its queue."""
    module = unpatched("dist_checkpointing.strategies.filesystem_async")
    monkeypatch.setattr(module, "get_write_results_queue", queue.Queue)
    return module


@pytest.fixture
def no_checksums() -> Iterator[None]:
    """Let `torch.save` write zeros instead of checksums; the writer never has those of tensors."""
    envelope.cache_clear()
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)
    envelope.cache_clear()


def test_one_copy_at_a_time_is_in_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_parts, "_BATCH_PARTS", 1)  # small copies are written together
    copied, _ = save(tmp_path / "saved", on_device())
    assert (copied.total, copied.peak) == (4 * sum(SIZES), 4 * max(SIZES))


@pytest.mark.parametrize("make", [on_device, views_on_host])
def test_megatron_copies_everything_before_it_writes_without_the_patch(make: Any, stock: Any, tmp_path: Path) -> None:
    copied, _ = save_stock(stock, tmp_path / "saved", make())
    assert copied.peak == copied.total == 4 * sum(SIZES)


@pytest.mark.parametrize("make", [views_on_host, whole_on_host])
def test_contiguous_tensors_of_the_host_are_not_copied(make: Any, tmp_path: Path) -> None:
    copied, _ = save(tmp_path / "saved", make())
    assert copied.total == 0


@pytest.mark.usefixtures("no_checksums")
@pytest.mark.parametrize("make", [on_device, views_on_host, whole_on_host])
def test_the_files_are_those_of_megatrons_writer(make: Any, stock: Any, tmp_path: Path) -> None:
    _, results = save(tmp_path / "ours", make())
    _, expected = save_stock(stock, tmp_path / "stock", make())
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / each).iterdir()} for each in ("ours", "stock"))
    assert list(ours) == ["__0_0.distcp"]
    assert ours == theirs
    assert results == expected


def test_positions_in_several_files_are_those_of_megatrons_writer(stock: Any, tmp_path: Path) -> None:
    _, results = save(tmp_path / "ours", views_on_host(), threads=3)
    _, expected = save_stock(stock, tmp_path / "stock", views_on_host(), threads=3)
    assert sorted(results, key=repr) == sorted(expected, key=repr)
    assert len({each.storage_data.relative_path for each in results}) == 3
    for each in results:
        place = each.storage_data
        ours, theirs = (
            torch.load(
                io.BytesIO((tmp_path / folder / place.relative_path).read_bytes()[place.offset :][: place.length])
            )
            for folder in ("ours", "stock")
        )
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


@pytest.mark.usefixtures("no_checksums")
def test_an_empty_tensor_is_saved(stock: Any, tmp_path: Path) -> None:
    tensors = [torch.empty(0, 3), torch.ones(2)]
    save(tmp_path / "ours", tensors)
    save_stock(stock, tmp_path / "stock", tensors)
    assert (tmp_path / "ours/__0_0.distcp").read_bytes() == (tmp_path / "stock/__0_0.distcp").read_bytes()


def test_a_sink_gets_the_files_and_nothing_is_written(tmp_path: Path) -> None:
    memory, tensors = file_parts.CopyMemory(), views_on_host()
    files = file_parts.CopiedFiles(memory)
    save(tmp_path / "later", tensors, sink=files)
    assert list((tmp_path / "later").iterdir()) == []
    for tensor in tensors:
        tensor.zero_()
    files.write(lambda _: None)
    save(tmp_path / "at_once", views_on_host())
    later, at_once = (tmp_path / each / "__0_0.distcp" for each in ("later", "at_once"))
    assert later.read_bytes() == at_once.read_bytes()


def test_an_error_of_the_sink_is_a_result(tmp_path: Path) -> None:
    sink = SimpleNamespace(add_file=mock.Mock(side_effect=OSError("No space left on device")))
    _, results = save(tmp_path / "saved", whole_on_host(), sink=sink)
    assert "No space left on device" in str(results[0])


def test_the_tensors_that_were_saved_are_unchanged(tmp_path: Path) -> None:
    for number, make in enumerate((views_on_host, whole_on_host)):
        tensors = make()
        save(tmp_path / str(number), tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, make(), strict=True))

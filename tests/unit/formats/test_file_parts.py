"""Files are written part by part; copied tensors may change before they are written."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from grpo_mega.formats import background_flush, file_parts
from grpo_mega.formats.byte_ranges import read_slice, tensor_memory
from grpo_mega.formats.file_parts import CopiedFiles, CopyMemory, DirectFiles, write_file

VALUES = torch.arange(1000, dtype=torch.float32)
PARTS: list[bytes | Tensor] = [b"begin", VALUES, b"", VALUES.view(20, 50)[:, ::2], VALUES[3:5], VALUES[:0], b"end"]
CONTENT = b"".join(part if isinstance(part, bytes) else part.contiguous().numpy().tobytes() for part in PARTS)


@pytest.mark.parametrize("batch_bytes", [1, 7, 100, 1 << 24])
def test_parts_are_written_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_bytes: int
) -> None:
    monkeypatch.setattr(file_parts, "_BATCH_BYTES", batch_bytes)
    direct = DirectFiles()
    direct.add_file(tmp_path / "direct", PARTS)
    direct.flush()
    copied, counts = CopiedFiles(CopyMemory()), list[int]()
    copied.add_file(tmp_path / "copied", PARTS)
    copied.add_file(tmp_path / "bytes", [b"a", b"b"])
    copied.write(counts.append)
    copied.flush()
    assert (tmp_path / "direct").read_bytes() == (tmp_path / "copied").read_bytes() == CONTENT
    assert (tmp_path / "bytes").read_bytes() == b"ab"
    assert sum(counts) == len(CONTENT) + 2


def test_a_written_or_read_tensor_can_be_resized(tmp_path: Path) -> None:
    """`Tensor.numpy` would forbid it, and a policy that was saved could not be offloaded."""
    values, loaded = VALUES.clone(), torch.empty(1000)
    files = DirectFiles()
    files.add_file(tmp_path / "file", [values])
    files.flush()
    with (tmp_path / "file").open("rb") as file:
        read_slice(file.fileno(), 0, (1000,), (0,), loaded)
    assert torch.equal(loaded, values)
    for tensor in (values, loaded):
        tensor.untyped_storage().resize_(0)
        assert tensor.untyped_storage().nbytes() == 0


def test_a_view_of_memory_keeps_the_tensor_alive() -> None:
    view = tensor_memory(torch.full((1000,), 7, dtype=torch.uint8))
    gc.collect()
    torch.zeros(1000, dtype=torch.uint8)
    assert bytes(view) == b"\x07" * 1000
    assert len(tensor_memory(torch.empty(0))) == 0


def test_an_interrupted_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = file_parts.os.writev
    monkeypatch.setattr(file_parts.os, "writev", lambda fd, views: real(fd, [views[0][:5]]))
    write_file(tmp_path / "file", [b"0123456789ab", b"", b"cdefg"]).finish()
    assert (tmp_path / "file").read_bytes() == b"0123456789abcdefg"


def test_copied_tensors_may_change_before_they_are_written(tmp_path: Path) -> None:
    memory, values = CopyMemory(), VALUES.clone()
    for number in range(3):
        values.fill_(number)
        files = CopiedFiles(memory)
        for name in ("a", "b"):
            files.add_file(tmp_path / name, [b"x", values, values[:10]])
        assert memory.num_bytes == 2 * 1010 * 4  # the memory of the save before is used again
        values.fill_(-1)
        files.write(lambda _: None)
        files.flush()
        for name in ("a", "b"):
            assert (tmp_path / name).read_bytes() == b"x" + torch.full((1010,), float(number)).numpy().tobytes()


def test_memory_of_other_sizes_is_allocated_again(tmp_path: Path) -> None:
    memory = CopyMemory()
    for size in (10, 10, 500, 20):
        files = CopiedFiles(memory)
        files.add_file(tmp_path / "a", [VALUES[:size]])
        files.add_file(tmp_path / "b", [VALUES[:size]])
        assert memory.num_bytes == 2 * 4 * size
        files.write(lambda _: None)
        files.flush()
        assert (tmp_path / "b").read_bytes() == VALUES[:size].numpy().tobytes()


def test_a_full_disk_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left") as error:
        write_file(Path("/dev/full"), [b"content"])
    assert error.value.errno == errno.ENOSPC


def test_the_caller_can_stop_a_write(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise InterruptedError("stopped")

    files = CopiedFiles(CopyMemory())
    files.add_file(tmp_path / "file", [VALUES])
    with pytest.raises(InterruptedError, match="stopped"):
        files.write(stop)


@pytest.mark.parametrize("kind", ["direct", "copied"])
def test_a_flush_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    files = DirectFiles() if kind == "direct" else CopiedFiles(CopyMemory())
    files.add_file(tmp_path / "file", [VALUES])
    if isinstance(files, CopiedFiles):
        files.write(lambda _: None)
    monkeypatch.setattr(background_flush.os, "fsync", fail)
    with pytest.raises(OSError, match="input/output error"):
        files.flush()


@pytest.mark.parametrize("end", ["flushed", "abandoned", "a file fails", "a flush fails"])
def test_no_file_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    files = DirectFiles()
    for name in "abc":
        files.add_file(tmp_path / name, [VALUES])
    assert len(set(os.listdir("/proc/self/fd")) - before) == 3
    if end == "flushed":
        files.flush()
    elif end == "abandoned":
        files.abandon()
    elif end == "a file fails":
        with pytest.raises(OSError, match="No space left"):
            files.add_file(Path("/dev/full"), [b"content"])
    else:
        monkeypatch.setattr(background_flush.os, "fsync", mock.Mock(side_effect=OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            files.flush()
    assert set(os.listdir("/proc/self/fd")) == before

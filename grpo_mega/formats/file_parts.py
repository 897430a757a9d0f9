"""Files whose content is given in parts: bytes, and tensors whose values are written as they are in memory.

`DirectFiles` writes a file at once and copies at most one tensor at a time to host memory. `CopiedFiles` copies all
tensors of the files of one save to host memory, so that they can be written while the tensors change. Threads flush the
files to disk while they are written, and until `flush` returns.
A sink that raises an error has closed all files.
Asserted by tests/unit/formats/test_file_parts.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from grpo_mega.formats.background_flush import BackgroundFlush
from grpo_mega.formats.byte_ranges import tensor_memory
from grpo_mega.formats.host_buffers import HostBuffers

Part = bytes | Tensor
_BATCH_BYTES, _BATCH_PARTS = 1 << 20, 256  # of one system call; at most 1,024 parts are allowed


class _UnflushedFiles:
    """Files of a sink that are not flushed to the end."""

    def __init__(self) -> None:
        self._unflushed: list[BackgroundFlush] = []

    def _write_file(self, path: Path, parts: Iterable[bytes | memoryview], written: Callable[[int], None]) -> None:
        """Write a file; if that fails, close all files."""
        try:
            self._unflushed.append(write_file(path, parts, written))
        except BaseException:
            self.abandon()
            raise

    def flush(self, flushed: Callable[[], None] = lambda: None) -> None:
        """Flush all files, and close them. `flushed` is called after each file.

        Raises:
            OSError: a file cannot be flushed; all are closed.
        """
        try:
            while self._unflushed:
                self._unflushed.pop().finish()
                flushed()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close all files."""
        while self._unflushed:
            self._unflushed.pop().abandon()


class DirectFiles(_UnflushedFiles):
    """Writes each file when it is added."""

    def add_file(self, path: Path, parts: Sequence[Part]) -> None:
        """Write the file.

        Raises:
            OSError: it cannot be written.
        """
        self._write_file(path, (_in_host_memory(part) for part in parts), lambda _: None)


class CopyMemory:
    """Host memory for copies. It is kept, and used again by the next save, whose files have the same sizes."""

    def __init__(self) -> None:
        self._buffers: list[HostBuffers] = []
        self._used = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffers.num_bytes for buffers in self._buffers)

    def restart(self) -> None:
        """Note that no copy is needed any more."""
        self._used = 0

    def buffers(self, sizes: Sequence[int], device: torch.device) -> HostBuffers:
        """Return memory for parts of `sizes` bytes of tensors on `device`."""
        at, self._used = self._used, self._used + 1
        if at < len(self._buffers) and self._buffers[at].sizes != list(sizes):
            del self._buffers[at:]
        if at == len(self._buffers):
            self._buffers.append(HostBuffers(sizes, device))
        return self._buffers[at]


class CopiedFiles(_UnflushedFiles):
    """The files of one save on this rank, with copies of their tensors."""

    def __init__(self, memory: CopyMemory) -> None:
        """Copy into `memory`, which holds no other save any more."""
        super().__init__()
        memory.restart()
        self._memory = memory
        self._files: list[tuple[Path, list[bytes | list[Tensor]]]] = []

    def add_file(self, path: Path, parts: Sequence[Part]) -> None:
        """Copy the tensors of a file. When this returns, they may change."""
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if not tensors:
            self._files.append((path, [part for part in parts if isinstance(part, bytes)]))
            return
        device = tensors[0].device
        buffers = self._memory.buffers([tensor.nbytes for tensor in tensors], device)
        for i, tensor in enumerate(tensors):
            buffers.write(i, _as_bytes(tensor))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        numbers = iter(range(len(tensors)))
        self._files.append(
            (path, [part if isinstance(part, bytes) else list(buffers.pieces(next(numbers))) for part in parts])
        )

    def write(self, written: Callable[[int], None]) -> None:
        """Write all files. `written` is called with each number of bytes, and may raise.

        Raises:
            OSError: a file cannot be written.
        """
        for path, parts in self._files:
            self._write_file(path, (view for part in parts for view in _views(part)), written)


def write_file(
    path: Path, parts: Iterable[bytes | memoryview], written: Callable[[int], None] = lambda _: None
) -> BackgroundFlush:
    """Write the parts one after the other, and return the flush of the file, which the caller has to finish.

    `written` is called with numbers of bytes, and may raise.

    Raises:
        OSError: the file cannot be written.
    """
    flush = BackgroundFlush(path)
    try:
        waiting: list[memoryview] = []
        waiting_bytes = 0
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), _BATCH_BYTES):
                waiting.append(view[start : start + _BATCH_BYTES])
                waiting_bytes += len(waiting[-1])
                if waiting_bytes >= _BATCH_BYTES or len(waiting) >= _BATCH_PARTS:
                    _write_views(flush.descriptor, waiting, written)
                    flush.add(waiting_bytes)
                    waiting_bytes = 0
            del part, view  # a copy is freed before the next one is made
        _write_views(flush.descriptor, waiting, written)
    except BaseException:
        flush.abandon()
        raise
    return flush


def _write_views(descriptor: int, views: list[memoryview], written: Callable[[int], None]) -> None:
    """Write all views; `views` is empty afterwards."""
    while views:
        count = os.writev(descriptor, views)
        written(count)
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]


def _views(part: bytes | list[Tensor]) -> Iterator[bytes | memoryview]:
    if isinstance(part, bytes):
        yield part
    else:
        yield from map(tensor_memory, part)


def _in_host_memory(part: Part) -> bytes | memoryview:
    if isinstance(part, bytes):
        return part
    values = _plain(part)
    return tensor_memory(values if values.is_cpu else values.cpu())


def _as_bytes(tensor: Tensor) -> Tensor:
    return _plain(tensor).view(-1).view(torch.uint8)


def _plain(tensor: Tensor) -> Tensor:
    """Return contiguous values; a quantized tensor of Transformer Engine is dequantized."""
    values = tensor.dequantize() if "dequantize" in type(tensor).__dict__ else tensor
    return values.detach().contiguous()

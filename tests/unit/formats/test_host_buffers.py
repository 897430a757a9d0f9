"""Host memory in pieces that waste little, and parts that span them."""

from __future__ import annotations

import random

import pytest
import torch

from grpo_mega.formats import host_buffers
from grpo_mega.formats.host_buffers import MAX_PIECE_BYTES, HostBuffers, piece_sizes


def rounded_up(size: int) -> int:
    """Return what PyTorch's allocator of pinned memory allocates for a request."""
    return 1 << (size - 1).bit_length()


@pytest.mark.parametrize("num_bytes", [0, 1, 1023, 2**20, 3 * 2**20 + 5, 2**30, 2**30 + 1, int(8.2 * 2**30)])
def test_pieces_are_at_most_one_gibibyte_and_waste_less_than_one_mebibyte(num_bytes: int) -> None:
    sizes = piece_sizes(num_bytes)
    assert sum(sizes) == num_bytes
    assert max(sizes, default=0) <= MAX_PIECE_BYTES == 2**30
    assert all(sizes)
    assert sum(map(rounded_up, sizes)) - num_bytes < 2**20


def test_parts_may_span_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_buffers, "MAX_PIECE_BYTES", 64)
    monkeypatch.setattr(host_buffers, "_MIN_PIECE_BYTES", 16)
    draw = random.Random(0)
    sizes = [draw.randrange(200) for _ in range(20)]
    parts = [torch.tensor([draw.randrange(256) for _ in range(n)], dtype=torch.uint8) for n in sizes]
    buffers = HostBuffers(sizes, torch.device("cpu"))
    assert buffers.num_bytes == sum(sizes)
    assert [piece.nbytes for piece in buffers._pieces] == piece_sizes(sum(sizes))  # none is rounded up by much
    assert max(piece.nbytes for piece in buffers._pieces) == 64
    for i, part in enumerate(parts):
        buffers.write(i, part)
    for i, part in enumerate(parts):
        found = torch.empty_like(part)
        buffers.read(i, found)
        assert torch.equal(found, part)
        assert torch.equal(torch.cat([found[:0], *buffers.pieces(i)]), part)

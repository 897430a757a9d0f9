"""Host memory for storages: moved without a copy, copied once per change, and in pieces that waste little."""

from __future__ import annotations

import random

import pytest
import torch

from grpo_mega.policy.host_memory import (
    MAX_PIECE_BYTES,
    CopiedMemory,
    HostBuffers,
    HostMemory,
    MovedMemory,
    host_memory,
    piece_sizes,
)


@pytest.mark.parametrize("kind", [MovedMemory, CopiedMemory])
def test_content_survives_freeing_and_overwriting(kind: type[MovedMemory] | type[CopiedMemory]) -> None:
    bits = torch.tensor([0x7FC00001, -(2**31), 1, 2, 3], dtype=torch.int32)
    flat, other = bits.clone(), torch.arange(3, dtype=torch.bfloat16)
    view, storages = flat[1:3], [flat.untyped_storage(), other.untyped_storage()]
    memory: HostMemory = kind(storages)
    for _ in range(2):
        memory.take()
        for storage, size in zip(storages, (20, 6), strict=True):
            storage.resize_(0)
            storage.resize_(size)
        flat.fill_(7)
        assert view.tolist() == [7, 7]
        memory.give()
        assert torch.equal(flat, bits)
        assert view.tolist() == [-(2**31), 1]
        assert other.tolist() == [0.0, 1.0, 2.0]
        assert [storage.nbytes() for storage in storages] == [20, 6]


def test_moving_copies_nothing_and_leaves_an_empty_storage() -> None:
    values = torch.arange(1000.0)
    address = values.data_ptr()
    memory = MovedMemory([values.untyped_storage()])
    memory.take()
    assert values.untyped_storage().nbytes() == 0
    memory.give()
    assert values.data_ptr() == address
    assert values.sum() == 499500


def test_a_copy_is_made_again_only_after_a_change() -> None:
    values = torch.zeros(4)
    memory = CopiedMemory([values.untyped_storage()])
    memory.take()
    memory.give()
    values.fill_(1)
    memory.take()  # the change was not noted
    memory.give()
    assert values.tolist() == [0.0] * 4
    values.fill_(2)
    memory.changed()
    memory.take()
    values.fill_(3)
    memory.give()
    assert values.tolist() == [2.0] * 4


def test_host_storages_are_moved_and_others_copied() -> None:
    assert isinstance(host_memory([torch.zeros(1).untyped_storage()]), MovedMemory)
    assert isinstance(host_memory([torch.zeros(1, device="meta").untyped_storage()]), CopiedMemory)


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
    monkeypatch.setattr("grpo_mega.policy.host_memory.MAX_PIECE_BYTES", 64)
    monkeypatch.setattr("grpo_mega.policy.host_memory._MIN_PIECE_BYTES", 16)
    draw = random.Random(0)
    sizes = [draw.randrange(200) for _ in range(20)]
    parts = [torch.tensor([draw.randrange(256) for _ in range(n)], dtype=torch.uint8) for n in sizes]
    buffers = HostBuffers(sizes, torch.device("cpu"))
    assert buffers.num_bytes == sum(sizes)
    for i, part in enumerate(parts):
        buffers.write(i, part)
    for i, part in enumerate(parts):
        found = torch.empty_like(part)
        buffers.read(i, found)
        assert torch.equal(found, part)

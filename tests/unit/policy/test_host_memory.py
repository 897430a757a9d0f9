"""Host memory for storages: moved without a copy, or copied once per change."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.policy.host_memory import (
    CopiedMemory,
    HostMemory,
    MovedMemory,
    host_memory,
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

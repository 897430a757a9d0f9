"""The digest of a chunk is that of its blocks."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.checkpoint import written_state
from grpo_mega.checkpoint.written_state import _blocks
from grpo_mega.models.digest import slice_digest, wrap_int64
from grpo_mega.types import TensorSlice


@pytest.mark.parametrize("block_bytes", [1, 40, 200, 1 << 20])
@pytest.mark.parametrize("shape", [(), (7,), (1,), (9, 5), (1, 9, 5), (1, 1, 9), (3, 4, 5), (1, 1, 1)], ids=str)
def test_blocks_partition_a_chunk(shape: tuple[int, ...], block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_state, "_BLOCK_BYTES", block_bytes)
    covered = torch.zeros(shape, dtype=torch.int32)
    for offsets, size in _blocks(shape, 4):
        covered[tuple(slice(o, o + n) for o, n in zip(offsets, size, strict=True))] += 1
    assert bool((covered == 1).all())


def test_digests_of_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_state, "_BLOCK_BYTES", 4 * 70)
    values = torch.randn(1, 33, 35)
    parts = [
        slice_digest(values[:, o[1] : o[1] + n[1]], TensorSlice("w", o, n)) for o, n in _blocks(tuple(values.shape), 4)
    ]
    assert len(parts) == 17
    assert wrap_int64(sum(parts)) == slice_digest(values, TensorSlice("w", (0, 0, 0), (1, 33, 35)))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)], ids=str)
def test_an_empty_chunk_has_no_block(shape: tuple[int, ...]) -> None:
    assert list(_blocks(shape, 4)) == []

"""Pieces within chunks, compared with a brute-force count; direct writes; copies of the files that are not weights."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch

from grpo_mega.convert.streaming_copy import copy_side_files, identity_of
from grpo_mega.formats.byte_ranges import BLOCK_BYTES, tensor_memory, write_all, write_blocks
from grpo_mega.formats.planned_files import CHUNK_BYTES, SliceCopy, pieces_within, rows_at_once
from grpo_mega.types import TensorSlice

WHOLE = torch.arange(5 * 6).view(5, 6)
# the tensor in four pieces, at offset (1, 2) in a larger tensor
PIECES = [
    SliceCopy(TensorSlice("x", (r, c), (rows, columns)), (r + 1, c + 2))
    for r, rows in ((0, 3), (3, 2))
    for c, columns in ((0, 1), (1, 5))
]


def test_parts_of_pieces_cover_the_elements_of_every_box() -> None:
    larger = torch.full((7, 9), -1)
    larger[1:6, 2:8] = WHOLE
    for begin in itertools.product(range(7), range(9)):
        for shape in ((1, 1), (2, 3), (7 - begin[0], 9 - begin[1])):
            box = larger[begin[0] : begin[0] + shape[0], begin[1] : begin[1] + shape[1]]
            found = torch.full(tuple(box.shape), -1)
            for part in pieces_within(PIECES, begin, tuple(box.shape)):
                assert (found[part.index] == -1).all(), "an element of two pieces"
                found[part.index] = WHOLE[part.source.index]
            assert torch.equal(found, box)


def test_chunks_stay_below_their_size_and_start_at_blocks() -> None:
    assert rows_at_once((10, 4), torch.bfloat16) == 10
    assert rows_at_once((1 << 20, 1 << 10), torch.bfloat16) * (1 << 11) == CHUNK_BYTES
    assert rows_at_once((1000, CHUNK_BYTES), torch.bfloat16) == 1
    assert rows_at_once((1000, CHUNK_BYTES), torch.bfloat16, 128) == 128
    assert rows_at_once((100_000, 3000), torch.float64, 128) % 128 == 0


def test_all_files_but_weights_are_copied_and_made_writable(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "copy"
    base.mkdir()
    folder.mkdir()
    kept = {"config.json", "tokenizer.json", "modeling_x.py", "chat_template.jinja"}
    left = {"model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "tf_model.h5"}
    for name in kept | left:
        (base / name).write_text(name)
        (base / name).chmod(0o444)
    copy_side_files(base, folder)
    assert {path.name for path in folder.iterdir()} == kept
    assert all(path.stat().st_mode & 0o200 for path in folder.iterdir())


def test_the_identity_of_an_input_changes_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = identity_of(tmp_path, 5)
    assert identity_of(tmp_path, 5) == before != identity_of(tmp_path, 6)
    (tmp_path / "a").write_text("22")
    assert identity_of(tmp_path, 5) != before


def test_direct_writes_of_whole_blocks_and_the_rest_give_the_same_bytes(tmp_path: Path) -> None:
    arena = torch.randint(256, (5 * BLOCK_BYTES,), dtype=torch.uint8)
    base = -arena.data_ptr() % BLOCK_BYTES  # offset of the first aligned block
    for position, length in ((0, BLOCK_BYTES), (100, 3 * BLOCK_BYTES), (4000, 96), (8, 2 * BLOCK_BYTES), (1, 5)):
        values = arena[base + position % BLOCK_BYTES :][:length]
        path = tmp_path / f"{position}_{length}"
        usual = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(usual, position + length)
        direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        begin, end = write_blocks(direct, tensor_memory(values), values.data_ptr(), position)
        assert (position + begin) % BLOCK_BYTES == 0 or begin == end
        assert end - begin == max(0, (position + length) // BLOCK_BYTES - -(-position // BLOCK_BYTES)) * BLOCK_BYTES
        write_all(usual, tensor_memory(values)[:begin], position)
        write_all(usual, tensor_memory(values)[end:], position + end)
        assert path.read_bytes() == bytes(position) + bytes(values.tolist())
        os.close(usual)
        os.close(direct)


def test_memory_with_another_alignment_than_the_file_is_not_written_directly(tmp_path: Path) -> None:
    arena = torch.ones(4 * BLOCK_BYTES, dtype=torch.uint8)
    values = arena[-arena.data_ptr() % BLOCK_BYTES + 8 :]
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    assert write_blocks(descriptor, tensor_memory(values), values.data_ptr(), 0) == (0, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        write_blocks(-1, tensor_memory(values), values.data_ptr(), 8)  # errors other than alignment are raised
    os.close(descriptor)

"""Damaged and mismatched Hugging Face folders give an error that names the file, not a traceback of safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo_mega.formats.safetensors_reader import HfFiles
from grpo_mega.quantization import block_fp8
from grpo_mega.types import TensorSlice, UserError
from tests.helpers.error_messages import assert_names

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(2.0)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_single(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / SINGLE)
    return folder


def write_sharded(folder: Path, weight_map: object) -> Path:
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "two.safetensors")
    (folder / INDEX).write_text(json.dumps(weight_map))
    return folder


def message_of(folder: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> str:
    with pytest.raises(UserError) as caught:
        HfFiles(folder).check(shapes)
    return str(caught.value)


def assert_reads(folder: Path) -> None:
    checkpoint = HfFiles(folder)
    checkpoint.check(SHAPES)
    box = TensorSlice("a", (1, 2), (2, 2))
    assert checkpoint.read(box).tolist() == [[6.0, 7.0], [10.0, 11.0]]


def test_slices_are_read_from_one_file_and_from_several(tmp_path: Path) -> None:
    (tmp_path / "single").mkdir()
    assert_reads(write_single(tmp_path / "single", TENSORS))
    (tmp_path / "several").mkdir()
    weight_map = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    assert_reads(write_sharded(tmp_path / "several", weight_map))


def test_a_tied_model_may_contain_an_unused_head(tmp_path: Path) -> None:
    HfFiles(write_single(tmp_path, TENSORS | {"lm_head.weight": torch.ones(2)})).check(SHAPES)


def test_a_folder_without_safetensors_is_named(tmp_path: Path) -> None:
    assert_names(
        message_of(tmp_path), f"model.path={tmp_path}", "model.safetensors", "use a folder in safetensors format"
    )


@pytest.mark.parametrize(("kept", "expected"), [(0, "0 bytes"), (60, "52"), (-8, "bytes")])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int, expected: str) -> None:
    path = write_single(tmp_path, TENSORS) / SINGLE
    path.write_bytes(path.read_bytes()[:kept])
    assert_names(message_of(tmp_path), str(path), expected, "download the file again")


@pytest.mark.parametrize(("lost", "named"), [(8, ("b", "(2,)", "(0,)")), (20, ("a", "(3, 4)", "(2, 4)"))])
def test_the_error_of_a_truncated_file_has_the_first_incomplete_tensor_and_both_shapes(
    tmp_path: Path, lost: int, named: tuple[str, ...]
) -> None:
    path = write_single(tmp_path, TENSORS) / SINGLE
    path.write_bytes(path.read_bytes()[:-lost])
    assert_names(message_of(tmp_path), str(path), *named, "download the file again")


HEADERS = {
    b"x" * 40: "line 1 column 1",
    b"[1, 2]": "no attribute 'items'",
    b'{"a": 1}': "not subscriptable",
    b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}': "a has dtype F99",
    b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}': "1.0 is not a size",
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}': "-1 is not a size",
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}': "too many values",
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}': "4:8",
    b"[" * 200_000: "recursion",
    b'{"\xff': "codec can't decode",
}


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_of_garbage_is_named(tmp_path: Path, header: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert HEADERS[header] in message_of(tmp_path)


@pytest.mark.parametrize(("length", "expected"), [(2**63, "9223372036854775808 bytes"), (10**8, "24")])
def test_a_header_with_a_too_large_size_is_named(tmp_path: Path, length: int, expected: str) -> None:
    (tmp_path / SINGLE).write_bytes(length.to_bytes(8, "little") + bytes(24))
    assert_names(message_of(tmp_path), str(tmp_path / SINGLE), expected)


def test_a_single_file_beside_an_index_of_others_is_ambiguous(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    write_single(tmp_path, TENSORS)
    assert_names(message_of(tmp_path), SINGLE, INDEX, "remove")


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    write_single(tmp_path, {"a": TENSORS["a"], "c": torch.ones(1)})
    words = ("model.path", "b of shape (2,) missing", "c of shape (1,) unknown", "config.json")
    assert_names(message_of(tmp_path), *words)


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    write_single(tmp_path, TENSORS | {"a": torch.ones(4, 3)})
    assert_names(message_of(tmp_path), "model.path", "a", "(4, 3)", "config.json", "(3, 4)", "use matching files")


def test_a_missing_file_of_the_index_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "three.safetensors"}})
    with pytest.raises(UserError) as caught:
        HfFiles(tmp_path, expected=SHAPES)
    assert_names(caught.value, str(tmp_path / "three.safetensors"), "b of shape (2,)", "download the file again")


def test_a_tensor_missing_from_its_file_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}})
    path = str(tmp_path / "one.safetensors")
    assert_names(message_of(tmp_path), path, "no b", "no file of the index holds it", "use matching files")


def test_the_error_of_an_index_with_swapped_files_names_the_right_file(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}})
    with pytest.raises(UserError) as caught:
        HfFiles(tmp_path, expected=SHAPES)
    path = str(tmp_path / "two.safetensors")
    assert_names(caught.value, path, "no a of shape (3, 4)", "one.safetensors holds it", "use matching files")


@pytest.mark.parametrize("index", [b"{", b"[]", b"{}", b'{"weight_map": [1]}', b"\xff"])
def test_a_damaged_index_is_named(tmp_path: Path, index: bytes) -> None:
    (tmp_path / INDEX).write_bytes(index)
    assert_names(message_of(tmp_path), str(tmp_path / INDEX), "not an index", "download the file again")


def test_a_tensor_in_another_file_than_the_index_says_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    save_file(TENSORS, tmp_path / "one.safetensors")
    path = str(tmp_path / "one.safetensors")
    assert_names(message_of(tmp_path), path, "b of shape (2,)", "two.safetensors", "use matching files")


def test_an_index_with_a_file_outside_the_folder_is_rejected(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"weight_map": {"a": "../one.safetensors", "b": "two.safetensors"}})
    assert_names(message_of(tmp_path), "a", "'../one.safetensors'", "not a file of this folder")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_a_tensor_with_an_unsupported_dtype_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    write_single(tmp_path, TENSORS | {"b": torch.arange(2).to(dtype)})
    assert_names(message_of(tmp_path), "b of shape (2,)", str(dtype), "float32")


def test_a_header_that_contradicts_its_shapes_is_named(tmp_path: Path) -> None:
    path = write_single(tmp_path, TENSORS) / SINGLE
    path.write_bytes(path.read_bytes().replace(b'"shape":[3,4]', b'"shape":[3,5]'))
    assert_names(message_of(tmp_path), "a of shape (3, 5)", "float32", "0:48", "0:60")


BOXES = [((0, 0), (3, 4)), ((1, 0), (2, 4)), ((1, 2), (2, 2)), ((0, 3), (3, 1)), ((2, 1), (1, 0))]


@pytest.mark.parametrize(("offsets", "shape"), BOXES)
def test_only_the_bytes_of_a_slice_are_read(
    tmp_path: Path, offsets: tuple[int, int], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the bytes of the read system calls with the reported count."""
    checkpoint = HfFiles(write_single(tmp_path, TENSORS))
    asked, read = [], os.preadv

    def count_and_read(descriptor: int, buffers: list[memoryview], position: int) -> int:
        asked.append(sum(map(len, buffers)))
        return read(descriptor, buffers, position)

    monkeypatch.setattr(os, "preadv", count_and_read)
    box = TensorSlice("a", offsets, shape)
    assert torch.equal(checkpoint.read(box), TENSORS["a"][box.index])
    assert checkpoint.bytes_read == sum(asked) == 4 * shape[0] * shape[1]


def test_a_slice_is_read_into_a_view_with_other_strides_and_dtype(tmp_path: Path) -> None:
    checkpoint = HfFiles(write_single(tmp_path, TENSORS))
    out = torch.zeros(4, 3, dtype=torch.bfloat16)
    checkpoint.read_into(TensorSlice("a", (0, 0), (3, 4)), out.t())
    assert torch.equal(out.t().float(), TENSORS["a"])


def test_block_scaled_weights_are_read_as_bfloat16_at_any_offset(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    quantized = (torch.randn(200, 300, generator=generator) * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, generator=generator) + 0.5
    checkpoint = HfFiles(write_single(tmp_path, {"x.weight": quantized, "x.weight_scale_inv": scales}))
    checkpoint.check({"x.weight": (200, 300)})
    whole = block_fp8.dequantize(quantized, scales)
    box = TensorSlice("x.weight", (100, 250), (60, 50))
    assert torch.equal(checkpoint.read(box), whole[box.index])
    assert whole[130, 260] == (quantized[130, 260].float() * scales[1, 2]).bfloat16()


def test_scales_of_a_wrong_shape_are_named(tmp_path: Path) -> None:
    quantized = torch.zeros(200, 300).to(torch.float8_e4m3fn)
    write_single(tmp_path, {"x.weight": quantized, "x.weight_scale_inv": torch.ones(2, 2)})
    assert_names(message_of(tmp_path, {"x.weight": (200, 300)}), "x.weight_scale_inv", "(2, 2)", "float32", "(2, 3)")

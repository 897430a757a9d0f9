"""Damaged and mismatched Hugging Face folders: each is named, none ends in a traceback of safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo_mega.policy.weights import HfCheckpoint
from grpo_mega.types import Placement, TensorSlice, UserError

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
        HfCheckpoint(folder).check(shapes)
    return str(caught.value)


def assert_reads(folder: Path) -> None:
    checkpoint = HfCheckpoint(folder)
    checkpoint.check(SHAPES)
    box = TensorSlice("a", (1, 2), (2, 2))
    assert checkpoint.read(Placement(box, box)).tolist() == [[6.0, 7.0], [10.0, 11.0]]


def test_slices_are_read_from_one_file_and_from_several(tmp_path: Path) -> None:
    (tmp_path / "single").mkdir()
    assert_reads(write_single(tmp_path / "single", TENSORS))
    (tmp_path / "several").mkdir()
    weight_map = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    assert_reads(write_sharded(tmp_path / "several", weight_map))


def test_the_head_of_a_tied_model_may_be_left_over(tmp_path: Path) -> None:
    HfCheckpoint(write_single(tmp_path, TENSORS | {"lm_head.weight": torch.ones(2)})).check(SHAPES)


def test_a_folder_without_safetensors_is_named(tmp_path: Path) -> None:
    said = message_of(tmp_path)
    assert said == f"model.path={tmp_path} holds no model.safetensors; give a folder in safetensors format"


@pytest.mark.parametrize("kept", [0, 4, 60, -8])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = write_single(tmp_path, TENSORS) / SINGLE
    path.write_bytes(path.read_bytes()[:kept])
    said = message_of(tmp_path)
    assert said.startswith(f"{path}: cannot be read (")
    assert said.endswith("; download the file again")


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    write_single(tmp_path, {"a": TENSORS["a"], "c": torch.ones(1)})
    assert message_of(tmp_path) == ("model.path: tensors missing ['b'], unknown ['c']; is config.json of this model?")


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    write_single(tmp_path, TENSORS | {"a": torch.ones(4, 3)})
    assert message_of(tmp_path) == "model.path: a has shape (4, 3), config.json says (3, 4); use matching files"


def test_a_file_that_the_index_names_but_is_not_there_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "three.safetensors"}})
    said = message_of(tmp_path)
    assert said.startswith(f"{tmp_path / 'three.safetensors'}: cannot be read (")


def test_a_tensor_that_is_not_in_the_file_that_the_index_names_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}})
    path = tmp_path / "one.safetensors"
    assert message_of(tmp_path) == f"{path}: holds no b, which the index places there; use matching files"


@pytest.mark.parametrize("index", [b"{", b"[]", b"{}", b'{"weight_map": [1]}', b"\xff"])
def test_a_damaged_index_is_named(tmp_path: Path, index: bytes) -> None:
    (tmp_path / INDEX).write_bytes(index)
    said = message_of(tmp_path)
    assert said.startswith(f"{tmp_path / INDEX}: is no index of safetensors files (")
    assert said.endswith("; download the file again")

"""MXFP4 weights of gpt-oss equal those of transformers for every value and scale; mismatched tensors are rejected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo_mega.formats.safetensors_reader import HfFiles
from grpo_mega.quantization import mxfp4
from grpo_mega.types import TensorSlice, UserError


def random_packed(experts: int = 3, columns: int = 5, groups: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (experts, columns, groups)
    return (
        torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator),
        torch.randint(100, 150, shape, dtype=torch.uint8, generator=generator),
    )


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> HfFiles:
    save_file(tensors, folder / "model.safetensors")
    return HfFiles(folder)


def test_a_block_by_hand() -> None:
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0] = 0xF1  # elements 0 and 1: quantized values 1 and 15
    found = mxfp4.dequantize(blocks, torch.full((1, 1, 1), 129, dtype=torch.uint8))
    assert found.shape == (1, 32, 1)
    assert found[0, :3, 0].tolist() == [0.5 * 4, -6.0 * 4, 0.0]


def test_every_value_and_scale_equals_that_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 252, 1, 1)
    scales = torch.arange(1, 253, dtype=torch.uint8)[None, :, None].repeat(
        1, 1, 16
    )  # scales with finite and normal results
    found = mxfp4.dequantize(blocks, scales)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))
    assert torch.isfinite(found).all()


def test_values_are_exact_in_bfloat16() -> None:
    blocks, scales = random_packed()
    exact = mxfp4.CODES.double()[torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).int()]
    exact = (exact * 2.0 ** (scales.double()[..., None] - 127)).flatten(-2).transpose(1, 2)
    assert torch.equal(mxfp4.dequantize(blocks, scales).double(), exact)


def test_slices_at_any_offset_equal_those_of_the_whole_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "grpo_mega.formats.safetensors_reader._ELEMENTS_AT_ONCE", 200
    )  # one or several columns at a time
    blocks, scales = random_packed()
    whole = mxfp4.dequantize(blocks, scales)
    files = write_tensors(tmp_path, {"w_blocks": blocks, "w_scales": scales})
    files.check({"w": (3, 128, 5)})
    assert files.dtype("w") == torch.bfloat16
    for at, shape in (
        ((0, 0, 0), (3, 128, 5)),
        ((1, 31, 2), (2, 34, 3)),
        ((2, 64, 4), (1, 1, 1)),
        ((0, 5, 0), (1, 20, 5)),
    ):
        box = TensorSlice("w", at, shape)
        assert torch.equal(files.read(box), whole[box.index])
    before = files.bytes_read
    files.read(TensorSlice("w", (1, 32, 0), (1, 32, 2)))
    assert files.bytes_read - before == 2 * (16 + 1), "one block and its scale of each column, no others"


def test_mismatched_tensors_are_named(tmp_path: Path) -> None:
    blocks, scales = random_packed()
    for tensors, message in (
        ({"w_blocks": blocks}, r"w_blocks of shape \(3, 5, 4, 16\) and dtype torch.uint8 has no w_scales"),
        ({"w_blocks": blocks, "w_scales": scales, "w": torch.ones(1)}, "is stored together with w;"),
        ({"w_blocks": blocks, "w_scales": scales[:, :, :3].contiguous()}, r"w_scales of shape \(3, 5, 3\)"),
        ({"w_blocks": blocks.short(), "w_scales": scales}, "dtype torch.int16"),
    ):
        with pytest.raises(UserError, match=message):
            write_tensors(tmp_path, tensors)
    with pytest.raises(UserError, match=r"tensors w_scales of shape .* unknown"):
        write_tensors(tmp_path, {"w_scales": scales}).check({})

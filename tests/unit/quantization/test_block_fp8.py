"""Codes and scales of block-scaled FP8 weights survive bfloat16; trained blocks are scaled anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpo_mega.quantization import block_fp8
from grpo_mega.types import UserError


def every_code(rows: int, columns: int) -> Tensor:
    """All 254 codes that are no NaN, in turn."""
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    return codes[torch.arange(rows * columns) % len(codes)].view(rows, columns).view(block_fp8.FP8_DTYPE)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("seed", range(20))
def test_codes_and_scales_come_back_bit_for_bit_with_the_stored_scales(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = every_code(300, 200)
    # scales of any mantissa from 2^-60 to 2^20, and blocks whose largest code is far from 448
    scales = (1 + torch.rand(3, 2, generator=generator)) * 2.0 ** torch.randint(-60, 20, (3, 2), generator=generator)
    codes[:128, :128] = (codes[:128, :128].float().clamp(-3, 3)).to(block_fp8.FP8_DTYPE)
    again, kept = block_fp8.quantize(block_fp8.dequantize(codes, scales), scales)
    assert same_bits(again, codes)
    assert same_bits(kept, scales)


def test_a_block_of_zeros_with_the_scale_0_comes_back() -> None:
    codes, scales = torch.zeros(130, 3).to(block_fp8.FP8_DTYPE), torch.tensor([[0.0], [0.5]])
    codes[5, 1] = torch.tensor(-0.0).to(block_fp8.FP8_DTYPE)
    again, kept = block_fp8.quantize(block_fp8.dequantize(codes, scales), scales)
    assert same_bits(again, codes)
    assert same_bits(kept, scales)
    values = torch.ones(130, 3, dtype=torch.bfloat16)
    assert torch.equal(block_fp8.dequantize(*block_fp8.quantize(values, scales)), values)


def test_without_the_stored_scales_they_cannot_come_back() -> None:
    """Why they are kept: this is what recomputing them would give."""
    scales = torch.tensor([[0.0123456]])
    _, recomputed = block_fp8.quantize(block_fp8.dequantize(every_code(128, 128), scales))
    assert not torch.equal(recomputed, scales)
    assert recomputed.item() == pytest.approx(scales.item(), rel=2**-8)


def test_a_block_that_changed_is_scaled_by_its_largest_value_and_the_others_are_kept() -> None:
    codes, scales = every_code(256, 256), torch.tensor([[0.01, 0.02], [0.03, 0.04]])
    values = block_fp8.dequantize(codes, scales)
    values[200, 10] = 100.0
    again, found = block_fp8.quantize(values, scales)
    assert found[1, 0] == torch.tensor(100.0) / 448
    changed = torch.zeros(2, 2, dtype=torch.bool)
    changed[1, 0] = True
    assert torch.equal(found[~changed], scales[~changed])
    assert same_bits(again[:128], codes[:128])
    assert same_bits(again[:, 128:], codes[:, 128:])
    block = block_fp8.dequantize(again, found)[128:, :128].float()
    assert float((block - values[128:, :128].float()).abs().max()) <= 100.0 * 2**-4  # half of e4m3's coarsest step


def test_the_largest_value_gets_the_largest_code_and_zero_stays_zero() -> None:
    values = torch.zeros(130, 5, dtype=torch.bfloat16)
    values[3, 3] = -7.0
    codes, scales = block_fp8.quantize(values)
    assert codes[3, 3].float() == -448
    assert scales.tolist() == [[7 / 448], [1.0]]
    assert torch.equal(block_fp8.dequantize(codes, scales), values)


def test_what_has_no_code_is_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        block_fp8.quantize(torch.full((2, 2), float("nan")))
    with pytest.raises(UserError, match=r"scales have shape \(2, 2\), but \(2, 2\) values need \(1, 1\)"):
        block_fp8.quantize(torch.ones(2, 2), torch.ones(2, 2))

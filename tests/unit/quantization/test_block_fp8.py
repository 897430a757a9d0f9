"""Block-scaled FP8 weights are restored exactly after dequantizing to bfloat16; changed blocks get new scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpo_mega.quantization import block_fp8
from grpo_mega.types import UserError


def all_quantized_values(rows: int, columns: int) -> Tensor:
    """Return a matrix that repeats all 254 FP8 values that are not NaN."""
    quantized = torch.tensor([b for b in range(256) if b & 127 != 127], dtype=torch.uint8)
    return quantized[torch.arange(rows * columns) % len(quantized)].view(rows, columns).view(block_fp8.FP8_DTYPE)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("seed", range(20))
def test_values_and_scales_are_restored_bit_for_bit_with_the_stored_scales(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    quantized = all_quantized_values(300, 200)
    # scales with any mantissa from 2^-60 to 2^20, and blocks whose largest value is far from 448
    scales = (1 + torch.rand(3, 2, generator=generator)) * 2.0 ** torch.randint(-60, 20, (3, 2), generator=generator)
    quantized[:128, :128] = (quantized[:128, :128].float().clamp(-3, 3)).to(block_fp8.FP8_DTYPE)
    again, kept = block_fp8.quantize(block_fp8.dequantize(quantized, scales), scales)
    assert same_bits(again, quantized)
    assert same_bits(kept, scales)


def test_a_block_of_zeros_with_scale_0_is_restored() -> None:
    quantized, scales = torch.zeros(130, 3).to(block_fp8.FP8_DTYPE), torch.tensor([[0.0], [0.5]])
    quantized[5, 1] = torch.tensor(-0.0).to(block_fp8.FP8_DTYPE)
    again, kept = block_fp8.quantize(block_fp8.dequantize(quantized, scales), scales)
    assert same_bits(again, quantized)
    assert same_bits(kept, scales)
    values = torch.ones(130, 3, dtype=torch.bfloat16)
    assert torch.equal(block_fp8.dequantize(*block_fp8.quantize(values, scales)), values)


def test_scales_cannot_be_restored_without_the_stored_scales() -> None:
    """Recomputed scales differ slightly; this is why the stored scales are kept."""
    scales = torch.tensor([[0.0123456]])
    _, recomputed = block_fp8.quantize(block_fp8.dequantize(all_quantized_values(128, 128), scales))
    assert not torch.equal(recomputed, scales)
    assert recomputed.item() == pytest.approx(scales.item(), rel=2**-8)


def test_a_block_that_changed_is_scaled_by_its_largest_value_and_the_others_are_kept() -> None:
    quantized, scales = all_quantized_values(256, 256), torch.tensor([[0.01, 0.02], [0.03, 0.04]])
    values = block_fp8.dequantize(quantized, scales)
    values[200, 10] = 100.0
    again, found = block_fp8.quantize(values, scales)
    assert found[1, 0] == torch.tensor(100.0) / 448
    changed = torch.zeros(2, 2, dtype=torch.bool)
    changed[1, 0] = True
    assert torch.equal(found[~changed], scales[~changed])
    assert same_bits(again[:128], quantized[:128])
    assert same_bits(again[:, 128:], quantized[:, 128:])
    block = block_fp8.dequantize(again, found)[128:, :128].float()
    assert float((block - values[128:, :128].float()).abs().max()) <= 100.0 * 2**-4  # half of the largest step of e4m3


def test_the_largest_value_is_quantized_to_448_and_zero_stays_zero() -> None:
    values = torch.zeros(130, 5, dtype=torch.bfloat16)
    values[3, 3] = -7.0
    quantized, scales = block_fp8.quantize(values)
    assert quantized[3, 3].float() == -448
    assert scales.tolist() == [[7 / 448], [1.0]]
    assert torch.equal(block_fp8.dequantize(quantized, scales), values)


def test_values_that_are_not_finite_and_scales_of_another_shape_are_rejected() -> None:
    with pytest.raises(UserError, match="not finite"):
        block_fp8.quantize(torch.full((2, 2), float("nan")))
    with pytest.raises(UserError, match=r"scales .*\(2, 2\).*\(1, 1\)"):
        block_fp8.quantize(torch.ones(2, 2), torch.ones(2, 2))

"""FP8 rollouts: the values that the policy's ranks send are bit-equal to quantizing the whole weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpo_mega.interfaces import HeldSlice
from grpo_mega.models.digest import slice_digest, wrap_int64
from grpo_mega.models.fp8_tensors import is_quantized
from grpo_mega.quantization.block_fp8 import FP8_DTYPE, block_scales, quantize
from grpo_mega.quantization.fp8_checkpoint import SCALE_SUFFIX, fp8_shapes, quantization_config
from grpo_mega.types import TensorSlice, UserError, WeightMismatchError
from grpo_mega.weight_sync import digest_comparison
from grpo_mega.weight_sync.digest_comparison import parts_of
from grpo_mega.weight_sync.fp8 import Fp8Source, QuantizedSlice, fp8_tensors
from tests.helpers.fp8_weights import DOWN, NORM, O, Q, Source, weights


def rank_slices(rank: int) -> list[tuple[TensorSlice, bool]]:
    """Return the slices of one of two ranks: alternating heads of q (64 rows), columns of o, and copies of the rest."""
    heads = [TensorSlice(Q, (256 * rank + 64 * i, 0), (64, 300)) for i in range(4)]
    columns = TensorSlice(O, (0, 256 * rank), (300, 256))
    copies = [TensorSlice(DOWN, (0, 0), (200, 130)), TensorSlice(NORM, (0,), (300,))]
    head = TensorSlice("lm_head.weight", (0, 0), (64, 300))
    return [(hf, True) for hf in (*heads, columns)] + [(hf, rank == 0) for hf in (*copies, head)]


def sources(*, power_of_two: bool = False) -> list[Fp8Source]:
    return [Fp8Source(Source(weights(), rank_slices(rank)), power_of_two=power_of_two) for rank in range(2)]


def expected(*, power_of_two: bool = False) -> dict[str, Tensor]:
    """Return the FP8 checkpoint of the whole bf16 weights."""
    found: dict[str, Tensor] = {}
    for name, value in weights().items():
        if name in (Q, O, DOWN):
            found[name], found[name + SCALE_SUFFIX] = quantize(value.bfloat16(), power_of_two=power_of_two)
        else:
            found[name] = value
    return found


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_comparison, "PART", 5000)  # a few rows: quantizing in parts gives the same values


@pytest.mark.parametrize("power_of_two", [False, True])
def test_values_and_scales_of_all_shards_equal_those_of_the_whole_weights(power_of_two: bool) -> None:
    whole = expected(power_of_two=power_of_two)
    seen = {name: torch.zeros(value.shape, dtype=torch.int64) for name, value in whole.items()}
    for source in sources(power_of_two=power_of_two):
        assert source.hf_shapes() == {name: tuple(value.shape) for name, value in whole.items()}
        for held in source.shards():
            values = held.part(held.hf)
            assert values.dtype == held.dtype == whole[held.hf.name].dtype
            assert torch.equal(bits(values), bits(whole[held.hf.name][held.hf.index])), held.hf
            seen[held.hf.name][held.hf.index] += held.counted
    assert all(bool((count == 1).all()) for count in seen.values()), "each element and each scale is counted once"


@pytest.mark.parametrize("box", [((100, 7), (30, 200)), ((127, 128), (2, 1)), ((64, 0), (64, 300))])
def test_a_piece_at_any_offset_has_the_quantized_values_of_the_whole(
    box: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    piece, whole = TensorSlice(Q, *box), expected()
    held = HeldSlice(TensorSlice(Q, (0, 0), (512, 300)), (512, 300), weights()[Q])
    (quantized, *_) = Fp8Source(Source({Q: weights()[Q]}, [(held.hf, True)]), power_of_two=False).shards()
    assert isinstance(quantized, QuantizedSlice)
    assert torch.equal(bits(quantized.part(piece)), bits(whole[Q][piece.index]))


def test_digests_of_the_shards_add_up_to_those_of_the_whole() -> None:
    sums = dict.fromkeys(expected(), 0)
    for source in sources():
        for held in source.shards():
            if held.counted:
                for hf in parts_of(held.hf):
                    sums[hf.name] = wrap_int64(sums[hf.name] + slice_digest(held.part(hf), hf))
    for name, value in expected().items():
        assert sums[name] == slice_digest(value, TensorSlice(name, (0,) * value.dim(), tuple(value.shape))), name


def test_power_of_two_scales_are_the_smallest_that_fit_the_block() -> None:
    amax = torch.tensor([0.0, 448.0, 449.0, 896.0, 3.5, 1e-30])
    scales = block_scales(amax, power_of_two=True)
    assert scales.tolist()[:5] == [1.0, 1.0, 2.0, 2.0, 1 / 128]
    assert bool((amax / scales <= 448).all())
    assert bool((amax[1:] / (scales[1:] / 2) > 448).all())
    assert bool((torch.frexp(scales)[0] == 0.5).all())


@pytest.mark.parametrize("power_of_two", [False, True])
def test_streamed_whole_tensors_have_the_same_values_and_scales(power_of_two: bool) -> None:
    streamed = dict(fp8_tensors(lambda _: iter(weights().items()), power_of_two=power_of_two)(1))
    whole = expected(power_of_two=power_of_two)
    assert list(streamed) == list(fp8_shapes({name: tuple(value.shape) for name, value in weights().items()}))
    for name, value in whole.items():
        assert torch.equal(bits(streamed[name]), bits(value)), name
        assert streamed[name].dtype == value.dtype
    assert streamed[Q].dtype == FP8_DTYPE


def test_a_block_that_no_rank_holds_whole_is_rejected_with_its_position_and_a_remedy() -> None:
    slices = [(TensorSlice(Q, (0, 0), (320, 300)), True)]
    message = r"block of 0\.q_proj\.weight at \[256, 0\] .* holds 8192 elements; .* smaller parallel\.tp"
    with pytest.raises(UserError, match=message):
        Fp8Source(Source({Q: weights()[Q]}, slices), power_of_two=False).shards()


def test_a_value_that_is_not_finite_is_rejected() -> None:
    broken = weights()
    broken[DOWN][3, 4] = float("inf")
    with pytest.raises(WeightMismatchError, match=r"0\.down_proj\.weight has a value that is not finite"):
        Fp8Source(Source(broken, rank_slices(0)), power_of_two=False).shards()


@pytest.mark.parametrize(
    ("name", "shape", "coded"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (64, 64), True),
        ("model.layers.3.mlp.experts.7.down_proj.weight", (64, 64), True),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", (64, 64), True),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", (64, 64), True),
        ("model.layers.3.mlp.gate.weight", (64, 64), False),
        ("model.layers.3.block_sparse_moe.gate.weight", (64, 64), False),
        ("model.layers.3.self_attn.q_norm.weight", (64,), False),
        ("model.layers.3.self_attn.q_proj.bias", (64,), False),
        ("model.embed_tokens.weight", (64, 64), False),
        ("lm_head.weight", (64, 64), False),
    ],
)
def test_only_matrices_of_layers_are_quantized(name: str, shape: tuple[int, ...], coded: bool) -> None:
    assert is_quantized(name, shape) == coded
    assert len(fp8_shapes({name: shape})) == 1 + coded


def test_the_checkpoints_config_names_the_matrices_that_stay_unquantized() -> None:
    shapes = {
        "model.embed_tokens.weight": (256, 64),
        "model.layers.0.mlp.gate.weight": (8, 64),
        "model.layers.0.mlp.experts.0.up_proj.weight": (64, 64),
        "model.norm.weight": (64,),
    }
    assert quantization_config(shapes) == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.embed_tokens", "model.layers.0.mlp.gate"],
    }

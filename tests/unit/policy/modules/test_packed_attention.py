"""Attention and norm of packed rows against formulas per sequence."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_mega.policy.modules.packed_attention import PackedAttention, RMSNorm, length_batches, packed_attention
from tests.helpers.attention_oracle import bounds_of, reference_attention


def random_lengths(seed: int) -> list[int]:
    """Return ragged lengths, with sequences of one token, and a padding segment at the end."""
    rng = random.Random(seed)
    return [1, *(rng.choice([1, 2, 3, 7, 8, 9, 30, 64]) for _ in range(rng.randrange(1, 12))), rng.randrange(1, 40)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("heads", "kv_heads", "width", "v_width"), [(4, 4, 8, 8), (6, 2, 8, 8), (4, 1, 16, 12)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_packed_attention_is_attention_per_sequence_with_its_gradient(
    heads: int, kv_heads: int, width: int, v_width: int, scale: float | None, seed: int
) -> None:
    bounds = bounds_of(random_lengths(seed))
    total = int(bounds[-1])
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, v_width))
    exact = [torch.randn(total, *s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    inputs = [x.detach().float().requires_grad_() for x in exact]
    upstream = torch.randn(total, heads, v_width, generator=generator, dtype=torch.float64)

    expected = reference_attention(*exact, bounds, scale if scale is not None else width**-0.5)
    found = packed_attention(*inputs, bounds, scale)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)

    expected.backward(upstream)
    found.backward(upstream.float())
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 3, 500])
@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "scale"), [(4, 4, None), (6, 2, 0.7)])
def test_sinks_and_windows_are_those_of_the_formula_with_their_gradients(
    heads: int, kv_heads: int, scale: float | None, has_sinks: bool, window: int
) -> None:
    bounds = bounds_of(random_lengths(3))
    total, generator = int(bounds[-1]), torch.Generator().manual_seed(0)
    shapes = ((total, heads, 8), (total, kv_heads, 8), (total, kv_heads, 12), (heads,))
    exact = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    inputs = [x.detach().float().requires_grad_() for x in exact]
    upstream = torch.randn(total, heads, 12, generator=generator, dtype=torch.float64)
    sinks = (exact[3], inputs[3]) if has_sinks else (None, None)
    expected = reference_attention(*exact[:3], bounds, scale if scale is not None else 8**-0.5, sinks[0], window)
    found = packed_attention(*inputs[:3], bounds, scale, sinks=sinks[1], window=window)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    expected.backward(upstream)
    found.backward(upstream.float())
    for x, y in zip(inputs[: 3 + has_sinks], exact, strict=False):
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)


def test_tokens_do_not_attend_to_other_sequences() -> None:
    bounds = bounds_of([5, 1, 9, 4])
    q, k, v = torch.randn(3, 19, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    before = packed_attention(q, k, v, bounds, None)
    changed = slice(6, 15)
    for x in (q, k, v):
        x[changed] = 100.0
    after = packed_attention(q, k, v, bounds, None)
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[15:], after[15:])
    assert not torch.equal(before[changed], after[changed])


def test_a_row_that_cu_seqlens_does_not_cover_is_rejected() -> None:
    x = torch.zeros(5, 1, 4)
    with pytest.raises(AssertionError, match=r"cu_seqlens .*4.* 5 tokens"):
        packed_attention(x, x, x, bounds_of([4]), None)


def test_module_gives_the_heads_side_by_side() -> None:
    x = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    packed: Any = SimpleNamespace(cu_seqlens_q=bounds_of([4, 2]), max_seqlen_q=4)
    config: Any = SimpleNamespace(window_size=None, window_attn_skip_freq=None, softmax_type="vanilla")
    module = PackedAttention(config, 1)
    out = module(x, x, x, None, packed_seq_params=packed)
    assert torch.equal(out, packed_attention(x, x, x, packed.cu_seqlens_q, None).view(6, 8))
    with pytest.raises(AssertionError, match="always packs"):
        module(x, x, x, None)


@pytest.mark.parametrize("seed", range(10))
def test_no_batch_of_sequences_needs_more_than_twice_the_row(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randrange(1, 2 ** rng.randrange(1, 11)) for _ in range(40)]
    batches = length_batches(bounds_of(lengths))
    assert sum(batch.index.numel() for batch in batches) <= 2 * sum(lengths)
    assert sorted(torch.cat([batch.targets for batch in batches]).tolist()) == list(range(sum(lengths)))
    # the scores of one head are B x L x L: below twice the sum of the squares, far from T x T
    assert sum(b.index.size(0) * b.index.size(1) ** 2 for b in batches) <= 4 * sum(n * n for n in lengths)


def test_empty_segments_are_skipped() -> None:
    bounds = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(packed_attention(x, x, x, bounds, None), packed_attention(x, x, x, bounds_of([3, 2]), None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norm_is_its_formula_in_float32(dtype: torch.dtype, eps: float) -> None:
    config: Any = SimpleNamespace(params_dtype=dtype, sequence_parallel=True, use_cpu_initialization=True)
    norm = RMSNorm(config, 16, eps=eps)
    assert norm.weight.dtype == dtype
    assert norm.weight.sequence_parallel is True  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator))
    x = (0.3 * torch.randn(5, 3, 16, generator=generator)).to(dtype)
    exact = x.double()
    expected = exact / (exact.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight.double()
    out = norm(x)
    assert out.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    else:  # one rounding, at the end: at most half a unit of the 8 bits, and float32's own error
        torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)

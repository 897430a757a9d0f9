"""The flash kernel of a GPU against float64: it has the contract that tests/helpers/flash_on_cpu.py states."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.parallel.context_parallel import rank_index
from grpo_mega.policy.modules.flash_attention import Spans, can_use_flash, flash_attention
from grpo_mega.policy.modules.flash_context_attention import chunk_spans
from tests.helpers.attention_oracle import bounds_of, reference_attention

pytestmark = pytest.mark.gpu(1)
LENGTHS = [4, 64, 128, 12, 300]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("window", [0, 5, 128])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 128), (4, 4, 192), (8, 1, 64)])
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_the_kernel_is_attention_per_sequence_with_its_gradients(
    heads: int, kv_heads: int, width: int, has_sinks: bool, window: int, rank: int | None
) -> None:
    device, bounds = torch.device("cuda", torch.cuda.current_device()), bounds_of(LENGTHS)
    total, longest = int(bounds[-1]), max(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    shapes = ((total, heads, width), (total, kv_heads, width), (total, kv_heads, width), (heads,))
    inputs = [torch.randn(s, generator=generator).bfloat16().to(device).requires_grad_() for s in shapes]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    upstream = torch.randn(total, heads, width, generator=generator).bfloat16()
    sinks = (exact[3], inputs[3]) if has_sinks else (None, None)
    expected = reference_attention(*exact[:3], bounds, width**-0.5, sinks[0], window)
    q, k, v = inputs[:3]
    assert can_use_flash(q, v)
    mine = torch.arange(total) if rank is None else rank_index(bounds, 2, rank)
    if rank is None:
        spans = Spans(bounds.to(device), bounds.to(device), longest, longest)
    else:  # the two chunks of a context-parallel rank, whose keys are prefixes of the sequences
        spans, places = chunk_spans(bounds.to(device), longest, 2, rank, total)
        q, k, v = q[mine.to(device)], k[places], v[places]
    found = flash_attention(q, k, v, spans, None, sinks=sinks[1], window=window)
    assert relative(found, expected[mine]) < 0.01
    found.backward(upstream[mine].to(device))
    expected[mine].backward(upstream[mine].double())
    for x, y in zip(inputs[: 3 + has_sinks], exact, strict=False):
        assert x.grad is not None
        assert y.grad is not None
        assert relative(x.grad, y.grad) < 0.02

"""Flash attention of each context-parallel rank's queries against the formula for the whole row.

The messages between ranks are replaced by their expected contents, the kernel by its formula.
"""

from __future__ import annotations

import random

import pytest
import torch

from grpo_mega.parallel.context_parallel import rank_index
from grpo_mega.policy.modules import gathered_attention
from grpo_mega.policy.modules.flash_context_attention import chunk_spans, flash_context_attention
from tests.helpers.attention_oracle import bounds_of, reference_attention
from tests.helpers.context_ranks import ContextRanks
from tests.helpers.flash_on_cpu import install_flash_on_cpu


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 8), (4, 1, 16)])
@pytest.mark.parametrize(("cp", "scale"), [(2, None), (3, 0.7)])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5])
def test_the_ranks_together_are_attention_per_sequence_with_its_gradient(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    kv_heads: int,
    width: int,
    cp: int,
    scale: float | None,
    has_sinks: bool,
    window: int,
) -> None:
    install_flash_on_cpu()
    rng = random.Random(cp)
    bounds = bounds_of([2 * cp * rng.choice([0, 1, 2, 3, 7]) for _ in range(5)] + [2 * cp])
    total, longest = int(bounds[-1]), int(bounds.diff().max())
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, width))
    exact = [torch.randn(total, *s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    upstream = torch.randn(total, heads, width, generator=generator, dtype=torch.float64)
    sinks = torch.randn(heads, generator=generator, dtype=torch.float64, requires_grad=True) if has_sinks else None
    expected = reference_attention(*exact, bounds, scale if scale is not None else width**-0.5, sinks, window)
    expected.backward(upstream)
    q, k, v = (x.detach().float() for x in exact)
    ranks = ContextRanks(monkeypatch, gathered_attention, cp, k, v)
    float_sinks = None if sinks is None else sinks.detach().float().requires_grad_()
    row = gathered_attention.ContextRow(bounds, longest, scale, ranks.group, window)
    for ranks.rank in range(cp):
        share = rank_index(bounds, cp, ranks.rank)
        mine = [x[share].requires_grad_() for x in (q, k, v)]
        found = flash_context_attention(*mine, row, sinks=float_sinks)
        torch.testing.assert_close(found.double(), expected[share].detach(), rtol=1e-5, atol=1e-6)
        found.backward(upstream[share].float())
        assert exact[0].grad is not None
        assert mine[0].grad is not None
        torch.testing.assert_close(mine[0].grad.double(), exact[0].grad[share], rtol=1e-4, atol=1e-5)
    wanted = torch.cat([x.grad.flatten(1) for x in exact[1:] if x.grad is not None], 1)
    torch.testing.assert_close(ranks.grads.double(), wanted, rtol=1e-4, atol=1e-5)
    if float_sinks is not None:
        assert float_sinks.grad is not None
        assert sinks is not None
        torch.testing.assert_close(float_sinks.grad.double(), sinks.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cp", [2, 4])
def test_chunks_see_the_prefix_of_their_sequence_that_ends_with_them(cp: int) -> None:
    bounds = bounds_of([4 * cp, 2 * cp, 6 * cp])
    total = int(bounds[-1])
    for rank in range(cp):
        spans, keys = chunk_spans(bounds, 6 * cp, cp, rank, total)
        tokens = rank_index(bounds, cp, rank)
        assert len(keys) == total + total // (2 * cp)
        assert spans.query_bounds.tolist()[-1] == len(tokens)
        for i in range(len(spans.query_bounds) - 1):
            chunk = tokens[spans.query_bounds[i] : spans.query_bounds[i + 1]].tolist()
            seen = keys[spans.key_bounds[i] : spans.key_bounds[i + 1]].tolist()
            start = int(bounds[i // 2])
            assert seen == list(range(start, chunk[-1] + 1))

"""Attention of each context-parallel rank's queries against the formula for the whole row; the messages between
ranks are replaced by their expected contents. (Real ranks: tests/parallel/test_update.py.)"""

from __future__ import annotations

import random

import pytest
import torch

from grpo_mega.parallel.context_parallel import rank_index
from grpo_mega.policy.modules import context_parallel_attention as module
from grpo_mega.policy.modules import gathered_attention
from grpo_mega.policy.modules.context_parallel_attention import context_attention, query_batches
from tests.helpers.attention_oracle import bounds_of, reference_attention
from tests.helpers.context_ranks import ContextRanks


@pytest.mark.parametrize("mask_elements", [1, 500, 1 << 20])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "v_width"), [(4, 4, 8, 8), (4, 1, 16, 12)])
@pytest.mark.parametrize(("cp", "scale"), [(2, None), (3, 0.7)])
@pytest.mark.parametrize(("has_sinks", "window"), [(False, 0), (True, 5)])
def test_the_ranks_together_are_attention_per_sequence_with_its_gradient(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    kv_heads: int,
    width: int,
    v_width: int,
    cp: int,
    scale: float | None,
    has_sinks: bool,
    window: int,
    mask_elements: int,
) -> None:
    monkeypatch.setattr(module, "MASK_ELEMENTS", mask_elements)
    rng = random.Random(cp)
    bounds = bounds_of([2 * cp * rng.choice([1, 2, 3, 7]) for _ in range(5)])
    total = int(bounds[-1])
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, v_width))
    exact = [torch.randn(total, *s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    upstream = torch.randn(total, heads, v_width, generator=generator, dtype=torch.float64)
    sinks = torch.randn(heads, generator=generator, dtype=torch.float64, requires_grad=True) if has_sinks else None
    expected = reference_attention(*exact, bounds, scale if scale is not None else width**-0.5, sinks, window)
    expected.backward(upstream)
    q, k, v = (x.detach().float() for x in exact)
    gathered = torch.cat([k, k.new_zeros(total, kv_heads, 1)], -1) if has_sinks else k  # of `add_sinks`
    ranks = ContextRanks(monkeypatch, gathered_attention, cp, gathered, v)
    float_sinks = None if sinks is None else sinks.detach().float().requires_grad_()
    row = gathered_attention.ContextRow(bounds, int(bounds.diff().max()), scale, ranks.group, window)
    for ranks.rank in range(cp):
        share = rank_index(bounds, cp, ranks.rank)
        mine = [x[share].requires_grad_() for x in (q, k, v)]
        found = context_attention(*mine, row, sinks=float_sinks)
        torch.testing.assert_close(found.double(), expected[share].detach(), rtol=1e-5, atol=1e-6)
        found.backward(upstream[share].float())
        assert exact[0].grad is not None
        torch.testing.assert_close(mine[0].grad.double(), exact[0].grad[share], rtol=1e-4, atol=1e-5)
    assert exact[1].grad is not None
    assert exact[2].grad is not None
    found_keys, found_values = ranks.grads.double().split([gathered[0].numel(), v[0].numel()], 1)
    found_keys = found_keys.view(total, kv_heads, -1)[:, :, :width]
    torch.testing.assert_close(found_keys, exact[1].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_values, exact[2].grad.flatten(1), rtol=1e-4, atol=1e-5)
    if float_sinks is not None:
        assert float_sinks.grad is not None
        assert sinks is not None
        torch.testing.assert_close(float_sinks.grad.double(), sinks.grad, rtol=1e-4, atol=1e-5)


def test_masks_have_a_maximum_size_and_keys_without_a_query_are_skipped() -> None:
    bounds = bounds_of([4096, 256, 1024, 1024])
    for rank in range(2):
        places = []
        for batch in query_batches(bounds, 2, rank):
            for part, seen, mask in batch.slices():
                assert mask.numel() <= module.MASK_ELEMENTS
                assert seen == int(batch.positions[:, part].max()) + 1
            places += batch.queries[batch.real].tolist()
        assert sorted(places) == list(range(int(bounds[-1]) // 2))

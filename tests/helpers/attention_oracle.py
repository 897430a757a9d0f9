"""Attention of packed rows in float64, one sequence at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, sinks: Tensor | None = None, window: int = 0
) -> Tensor:
    """Return softmax(q k^T scale + causal mask) v, one sequence and one head after the other, in float64.

    A sink is an additional logit whose part of the softmax is dropped. With a window, a query attends to that many
    tokens, including itself.
    """
    out = torch.zeros(q.size(0), q.size(1), v.size(2), dtype=torch.float64)
    per_head = q.size(1) // k.size(1)
    for begin, end in pairwise(bounds.tolist()):
        future = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
        if window:
            future |= torch.ones_like(future).tril(-window)
        for head in range(q.size(1)):
            qh, kh, vh = q[begin:end, head], k[begin:end, head // per_head], v[begin:end, head // per_head]
            logits = (qh @ kh.T * scale).masked_fill(future, float("-inf"))
            if sinks is not None:
                logits = torch.cat([logits, sinks[head].expand(len(logits), 1)], 1)
            out[begin:end, head] = logits.softmax(-1)[:, : end - begin] @ vh
    return out

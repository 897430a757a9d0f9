"""The two operators of torch's flash kernel on CPU, computed by their formula.

torch has them for CUDA only. Contract (torch/nn/attention/varlen.py; flash_api.cpp of torch): the mask is aligned at
the end of both sequences, -1 is no window, and the logarithm of the sum of exponentials is [heads, queries] float32.
The backward operator recomputes the probabilities from it and takes the output only for the sum of output . gradient,
as the kernel does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@functools.cache
def install_flash_on_cpu() -> torch.library.Library:
    """Register both operators for CPU tensors in this process. Idempotent."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")
    return library


def _sequences(
    query_bounds: Tensor, key_bounds: Tensor, longest: tuple[int, int], is_causal: bool, left: int, right: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (queries, keys, mask that is True where a query sees a key) of each sequence."""
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    assert right == 0, "every mask here is causal"
    assert is_causal == (left == -1), "as torch.nn.attention.varlen calls the operators"
    for (q0, q1), (k0, k1) in zip(pairwise(query_bounds.tolist()), pairwise(key_bounds.tolist()), strict=True):
        assert q1 - q0 <= longest[0]
        assert k1 - k0 <= longest[1]
        behind = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        mask = behind >= 0
        yield slice(q0, q1), slice(k0, k1), mask & (behind <= left) if left >= 0 else mask


def _logits(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    keys = k.repeat_interleave(q.size(1) // k.size(1), 1)
    return (torch.einsum("qnd,knd->nqk", q, keys) * scale).masked_fill(~mask, float("-inf"))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, query_bounds: Tensor, key_bounds: Tensor, max_q: int, max_k: int, dropout: float,
    is_causal: bool, return_debug_mask: bool, *, scale: float | None = None, window_size_left: int = -1,
    window_size_right: int = -1, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert dropout == 0.0
    assert not return_debug_mask
    assert q.shape[1:] == (q.size(1), v.size(2)), "one head dimension"
    scale = q.size(-1) ** -0.5 if scale is None else scale
    out, log_sum = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.size(1), q.size(0), dtype=torch.float64)
    sequences = (query_bounds, key_bounds, (max_q, max_k), is_causal, window_size_left, window_size_right)
    for queries, keys, mask in _sequences(*sequences):
        logits = _logits(q[queries].double(), k[keys].double(), mask, scale)
        values = v[keys].double().repeat_interleave(q.size(1) // v.size(1), 1)
        out[queries] = torch.einsum("nqk,knd->qnd", logits.softmax(-1), values)
        log_sum[:, queries] = logits.logsumexp(-1)
    unused = torch.empty(0)
    return out.to(q.dtype), log_sum.float(), torch.zeros(2, dtype=torch.uint64), unused, unused


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, query_bounds: Tensor,
    key_bounds: Tensor, max_q: int, max_k: int, dropout: float, is_causal: bool, random_state: Tensor, unused: Tensor,
    *, scale: float | None = None, window_size_left: int = -1, window_size_right: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    del dropout, random_state, unused
    scale = q.size(-1) ** -0.5 if scale is None else scale
    groups = q.size(1) // k.size(1)
    grads = [torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v)]
    dots = (grad.double() * out.double()).sum(-1).t()  # [n, T]
    sequences = (query_bounds, key_bounds, (max_q, max_k), is_causal, window_size_left, window_size_right)
    for queries, keys, mask in _sequences(*sequences):
        logits = _logits(q[queries].double(), k[keys].double(), mask, scale)
        p = (logits - log_sum[:, queries].double()[:, :, None]).exp()
        upstream = grad[queries].double()
        many_k, many_v = (x[keys].double().repeat_interleave(groups, 1) for x in (k, v))
        ds = p * (torch.einsum("qnd,knd->nqk", upstream, many_v) - dots[:, queries][:, :, None]) * scale
        grads[0][queries] += torch.einsum("nqk,knd->qnd", ds, many_k)
        for total, part in (
            (grads[1], torch.einsum("nqk,qnd->knd", ds, q[queries].double())),
            (grads[2], torch.einsum("nqk,qnd->knd", p, upstream)),
        ):
            total[keys] += part.unflatten(1, (-1, groups)).sum(2)
    dq, dk, dv = (x.to(y.dtype) for x, y in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv

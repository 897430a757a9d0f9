"""Attention of a packed row that is split over context-parallel ranks: what all of its kernels share.

Each rank has the queries, keys and values of its part of every sequence (parallel/context_parallel.py). Keys and
values of all ranks are gathered in the forward pass, and again in the backward pass, which returns to each rank the
summed gradient of its own keys and values. Kernels: context_parallel_attention.py and flash_context_attention.py, whose
tests assert it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_mega.parallel.context_parallel import gather_rows, sum_shares


@dataclass(frozen=True)
class ContextRow:
    """A packed row of T tokens and its attention, the same on all context-parallel ranks."""

    cu_seqlens: Tensor
    """[B + 1]; every sequence has a multiple of 2 cp tokens."""
    longest: int
    """Tokens of the longest sequence."""
    scale: float | None
    """Of the logits; None: 1 / sqrt(d)."""
    group: dist.ProcessGroup
    """The context-parallel ranks."""
    window: int = 0
    """Tokens that a query sees, itself included; 0: all before it."""


@dataclass(frozen=True)
class RowGradients:
    """Gradients of this rank's queries, of the keys and values of the whole row in float32, and of the sinks.

    They are float32 even for bfloat16, because the gradient of a key is a sum over parts of the queries and over ranks.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    sinks: Tensor | None = None


class RowKernel(Protocol):
    """Computes causal attention of this rank's queries over the keys and values of the whole row."""

    def forward(
        self, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None, row: ContextRow
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output [T/cp, n, e], and what the backward pass needs of this pass."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None, kept: tuple[Tensor, ...],
        row: ContextRow,
    ) -> RowGradients:  # fmt: skip
        """Return the gradients; `kept` comes from `forward`."""
        ...


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, row: ContextRow, kernel: RowKernel, *, sinks: Tensor | None = None
) -> Tensor:
    """Causal attention inside each sequence of a packed row of T tokens, for the queries of this rank.

    Args:
        q: [T/cp, n, d], of this rank's tokens.
        k: [T/cp, m, d], n a multiple of m (grouped queries).
        v: [T/cp, m, e]; the kernel says if e may differ from d.
        row: the whole row.
        kernel: computes the attention.
        sinks: [n] logits of an additional key with value 0 (attention sink), if the kernel supports them.
    Returns:
        [T/cp, n, e].
    """
    out: Tensor = _GatheredAttention.apply(q, k, v, sinks, row, kernel)  # type: ignore[no-untyped-call]
    return out


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, row: ContextRow, kernel: RowKernel
    ) -> Tensor:
        out, kept = kernel.forward(q, *_gather(k, v, row), sinks, row)
        ctx.save_for_backward(q, k, v, sinks, *kept)
        ctx.row, ctx.kernel = row, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, *kept = ctx.saved_tensors
        row: ContextRow = ctx.row
        grads: RowGradients = ctx.kernel.backward(grad, q, *_gather(k, v, row), sinks, tuple(kept), row)
        both = torch.cat([grads.keys.flatten(1), grads.values.flatten(1)], 1)
        grad_k, grad_v = _split(sum_shares(both, row.cu_seqlens, row.group), k, v)
        return grads.queries, grad_k.to(k.dtype), grad_v.to(v.dtype), grads.sinks, None, None


def _gather(k: Tensor, v: Tensor, row: ContextRow) -> tuple[Tensor, Tensor]:
    """Gather keys [T, m, d] and values [T, m, e] of the whole row in one message."""
    return _split(gather_rows(torch.cat([k.flatten(1), v.flatten(1)], 1), row.cu_seqlens, row.group), k, v)


def _split(both: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values with the heads of k and v, from their concatenation [T, ...]."""
    keys, values = both.split([k[0].numel(), v[0].numel()], dim=1)
    return keys.reshape(-1, *k.shape[1:]), values.reshape(-1, *v.shape[1:])

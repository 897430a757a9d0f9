"""Causal attention of packed sequences with torch's flash kernel for rows of sequences (CUDA only).

One kernel launch computes all sequences of a row, in either pass. It reads queries, keys and values where they are, and
keeps their gradients, the output and one number per token and head: memory is linear in the tokens, also with windows
and attention sinks. The kernel is the one behind torch.nn.attention.varlen, called through the operators of ATen,
because `varlen_attn` does not return the gradient of a sink.

A query of the last l of L keys sees the first L - l keys, and then its own part causally: the kernel aligns the mask
at the end of both sequences (torch/nn/attention/bias.py, CausalVariant.LOWER_RIGHT). flash_context_attention.py
relies on it.

Attention sinks. A sink adds a key with value 0 and logit s. With out and L = log sum exp of the kernel, the output with
the sink is out * exp(L - L'), L' = log(exp(L) + exp(s)). The kernel's backward pass needs only an output and its log
sum exp to recompute the probabilities, so it gets these two with the sink. The gradient of s is the sum over the tokens
of -exp(s - L') (output . gradient).

Asserted by tests/unit/policy/modules/test_flash_attention.py against float64, with the two operators computed by a
formula on CPU; the kernel itself runs in tests/gpu.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGEST_WIDTH = 256
"""Largest head dimension of the kernel; a smaller one must be a multiple of 8 (flash_api.cpp of torch)."""


@dataclass(frozen=True)
class Spans:
    """Sequences of a packed row: B ranges of queries, and of the keys that they see.

    query_bounds, key_bounds: [B + 1] int32, from 0 to the number of queries and of keys.
    longest_query, longest_key: upper bounds of the lengths, on the host, so that no call waits for the GPU.
    """

    query_bounds: Tensor
    key_bounds: Tensor
    longest_query: int
    longest_key: int


def can_use_flash(q: Tensor, v: Tensor) -> bool:
    """Return whether the kernel computes these queries and values: 16-bit, equal head dimensions, on a recent GPU."""
    width = q.size(-1)
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and width == v.size(-1)
        and width % 8 == 0
        and width <= LARGEST_WIDTH
        and _device_has_flash(q.device)
    )


@functools.cache
def _device_has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float | None, *, sinks: Tensor | None = None, window: int = 0
) -> Tensor:
    """Causal attention inside each sequence of a packed row.

    Args:
        q: [T, n, d].
        k: [S, m, d], n a multiple of m (grouped queries).
        v: [S, m, d].
        spans: the sequences.
        scale: of the logits; None: 1 / sqrt(d).
        sinks: [n] logits of an additional key with value 0 (attention sink); None: no sink.
        window: tokens that a query sees, itself included; 0: all before it.
    Returns:
        [T, n, d].
    """
    out: Tensor = _FlashAttention.apply(q, k, v, sinks, spans, scale, window)  # type: ignore[no-untyped-call]
    return out


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, spans: Spans, scale: float | None, window: int
    ) -> Tensor:
        out, log_sum = flash_forward(q, k, v, spans, scale, sinks, window)
        ctx.save_for_backward(q, k, v, sinks, out, log_sum)
        ctx.spans, ctx.scale, ctx.window = spans, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, log_sum = ctx.saved_tensors
        grads = flash_backward(grad, q, k, v, out, log_sum, ctx.spans, ctx.scale, ctx.window)
        return *grads, sink_gradient(grad, out, log_sum, sinks), None, None, None


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float | None, sinks: Tensor | None, window: int
) -> tuple[Tensor, Tensor]:
    """Return the output [T, n, d] and log sum exp of the logits [n, T] float32, both with the sinks."""
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        *map(_with_dense_heads, (q, k, v)), *_arguments(spans, window), False, **_options(scale, window)
    )
    if sinks is None:
        return out, log_sum
    total = torch.logaddexp(log_sum, sinks.to(log_sum.dtype)[:, None])
    return out * (log_sum - total).exp().t()[:, :, None].to(out.dtype), total


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, spans: Spans, scale: float | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v; `out` and `log_sum` come from `flash_forward`."""
    # the state of the random numbers of a dropout, which does not exist here (torch/nn/attention/varlen.py)
    random_state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        *map(_with_dense_heads, (grad, q, k, v, out, log_sum)), *_arguments(spans, window), random_state, unused,
        **_options(scale, window),
    )  # fmt: skip
    return found


def sink_gradient(grad: Tensor, out: Tensor, log_sum: Tensor, sinks: Tensor | None) -> Tensor | None:
    """Return the gradient [n] of the sinks, from the gradient and the output [T, n, d] with them."""
    if sinks is None:
        return None
    share = (sinks.to(log_sum.dtype)[:, None] - log_sum).exp()  # of the sink in the softmax: [n, T]
    products = (grad.to(log_sum.dtype) * out.to(log_sum.dtype)).sum(-1)
    return -(share * products.t()).sum(1).to(sinks.dtype)


def _with_dense_heads(x: Tensor) -> Tensor:
    """Return x, or a copy if its last dimension has gaps: the kernel reads any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _arguments(spans: Spans, window: int) -> tuple[Any, ...]:
    """Return the arguments that follow the tensors: boundaries, lengths, no dropout, and whether no window limits."""
    return spans.query_bounds, spans.key_bounds, spans.longest_query, spans.longest_key, 0.0, not window


def _options(scale: float | None, window: int) -> dict[str, Any]:
    """Return the scale, and the number of keys that a query sees to its left (-1: all) and to its right."""
    return {"scale": scale, "window_size_left": window - 1 if window else -1, "window_size_right": 0}

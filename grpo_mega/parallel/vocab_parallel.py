"""Log-probs and entropy of one packed row, from hidden states and this rank's rows of the head.

The full logits [T, V/tp] are never materialized: both passes process slices of T, and the backward pass recomputes the
logits of each slice. Each slice is reduced to four numbers per token; those of all slices are combined over the TP
ranks by one all_gather at the end of the forward pass. The backward pass communicates nothing.

Rank r holds rows [r * V_pad/tp, (r + 1) * V_pad/tp) of the padded head. Rows from `vocab_size` on are padding: they
are excluded from softmax and entropy, whatever their values, and their gradient is zero.

Invariants: equal to log_softmax over the whole vocabulary (test_values_and_gradients_equal_float64_log_softmax), for
every slice size (test_slices_of_any_size_give_the_same), with garbage in the padding (test_padding_rows_are_inert) and
for every tp (test_gloo_ranks_agree_bit_for_bit_with_one_collective).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Size of two float32 buffers [slice, V/tp] together: large enough for matrix products at full speed.
SLICE_BYTES = 128 * 2**20


def vocab_parallel_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    slice_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs log softmax(z)[label] and entropies -sum_v p_v log p_v of z = hidden @ weight^T / temperature.

    The product is computed in the dtype of `hidden` and `weight`, everything after it in float32. Both results carry
    gradient: d log_prob / dz_v = 1[v = label] - p_v and d entropy / dz_v = -p_v (log p_v + entropy). Without grad mode
    no other tensor is kept after the call.

    Under TP the gradient of `hidden` is this rank's *partial* sum, over its own rows of the head: the caller must
    apply an operation to `hidden` that is identity forward and all-reduce backward (with sequence parallelism:
    all-gather forward and reduce-scatter backward). The gradient of `weight` is complete.

    Args:
        hidden: [T, H], the same on all ranks of `group`.
        weight: [V_pad/tp, H], this rank's rows of the head.
        labels: [T] int64 in [0, vocab_size), the predicted tokens, also at positions that are not trained on.
        temperature: > 0; divides the logits.
        vocab_size: rows of the whole head without padding.
        group: the TP ranks in the order of their rows; None: this rank holds all rows.
        slice_tokens: tokens per slice; None: as many as fit into SLICE_BYTES, at least one.

    Returns:
        log_probs [T] and entropy [T], float32, bit-identical on all ranks of `group`.

    Raises:
        ValueError: temperature <= 0, slice_tokens < 1, vocab_size above the number of rows of the group, or a label
        outside of
            the vocabulary (names the position).
    """
    tp = 1 if group is None else dist.get_world_size(group)
    tp_rank = 0 if group is None else dist.get_rank(group)
    num_rows = weight.shape[0]
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; must be > 0")
    if not 0 < vocab_size <= tp * num_rows:
        raise ValueError(f"vocab_size={vocab_size}; the head has {tp} x {num_rows} rows")
    outside = ((labels < 0) | (labels >= vocab_size)).nonzero()
    if len(outside):
        position = int(outside[0])
        raise ValueError(f"labels[{position}]={int(labels[position])}; must be in [0, {vocab_size})")
    first_row = tp_rank * num_rows
    shard = _Shard(
        first_row=first_row,
        num_rows=min(max(vocab_size - first_row, 0), num_rows),
        temperature=temperature,
        slice_tokens=_slice_tokens(len(labels), num_rows, slice_tokens),
        group=group,
    )
    log_probs, entropy = _LogProbs.apply(hidden, weight, labels, shard)  # type: ignore[no-untyped-call]
    return log_probs, entropy


@dataclass(frozen=True)
class _Shard:
    """This rank's rows [first_row, first_row + num_rows) of the vocabulary, without padding, and the slice size."""

    first_row: int
    num_rows: int
    temperature: float
    slice_tokens: int
    group: dist.ProcessGroup | None

    def slices(self, num_tokens: int) -> list[slice]:
        return [slice(t, min(t + self.slice_tokens, num_tokens)) for t in range(0, num_tokens, self.slice_tokens)]

    def buffer(self, like: Tensor) -> Tensor:
        """Return a float32 buffer [slice_tokens, num_rows] that all slices reuse."""
        return torch.empty(self.slice_tokens, self.num_rows, dtype=torch.float32, device=like.device)

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """Compute hidden @ weight^T / temperature in float32 into the first rows of `out`: [t, num_rows]."""
        out = out[: len(hidden)]
        if hidden.dtype == torch.float32:
            torch.mm(hidden, weight.t(), out=out)
        else:
            out.copy_(torch.mm(hidden, weight.t()))
        return out if self.temperature == 1 else out.div_(self.temperature)

    def local_labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels as rows of this shard [t, 1], 0 where the row is not local, and a mask of local rows [t, 1]."""
        rows = (labels - self.first_row).unsqueeze(1)
        here = (rows >= 0) & (rows < self.num_rows)
        return torch.where(here, rows, 0), here


def _slice_tokens(num_tokens: int, num_rows: int, wanted: int | None) -> int:
    """Return the tokens per slice: at most `wanted` or what fits, with slices of nearly equal size."""
    if wanted is None:
        wanted = max(1, SLICE_BYTES // (2 * 4 * num_rows))
    if wanted < 1:
        raise ValueError(f"slice_tokens={wanted}; must be >= 1")
    num_slices = max(1, math.ceil(num_tokens / wanted))
    return max(1, math.ceil(num_tokens / num_slices))


def _partials(hidden: Tensor, weight: Tensor, labels: Tensor, shard: _Shard) -> Tensor:
    """Return [4, T]: m = max z; s = sum exp(z - m); u = sum exp(z - m) (z - m); z[label], or 0 if not local."""
    partials = torch.zeros(4, len(labels), dtype=torch.float32, device=hidden.device)
    if shard.num_rows == 0:
        # Only padding. Not -inf: its product with s = 0 would be nan when shards are combined.
        partials[0] = torch.finfo(torch.float32).min
        return partials
    logits_buffer, exp_buffer = shard.buffer(hidden), shard.buffer(hidden)
    for part in shard.slices(len(labels)):
        maximum, sum_exp, sum_exp_z, label_logit = partials[:, part].unbind()
        z = shard.logits(hidden[part], weight, logits_buffer)
        rows, here = shard.local_labels(labels[part])
        label_logit.copy_(torch.where(here, z.gather(1, rows), 0.0).squeeze(1))
        torch.amax(z, dim=1, out=maximum)
        z.sub_(maximum.unsqueeze(1))
        exp_z = torch.exp(z, out=exp_buffer[: len(z)])
        torch.sum(exp_z, dim=1, out=sum_exp)
        torch.sum(z.mul_(exp_z), dim=1, out=sum_exp_z)
    return partials


def _combine(partials: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Combine the softmax of all shards:
    M = max m_r, S = sum s_r exp(m_r - M), U = sum exp(m_r - M) (u_r + s_r (m_r - M)).

    Args:
        partials: [tp, 4, T] in the order of the ranks, so that every rank adds in the same order.

    Returns:
        log_probs = (z[label] - M) - log S, entropy = log S - U / S, and for the backward pass M, S and U / S,
        the mean of z - M under p. Each [T].
    """
    maxima, sums_exp, sums_exp_z, label_logits = partials.unbind(dim=1)
    maximum = maxima.amax(dim=0)
    distance = maxima - maximum
    scale = distance.exp()
    sum_exp = (sums_exp * scale).sum(dim=0)
    mean_z = (scale * (sums_exp_z + sums_exp * distance)).sum(dim=0) / sum_exp
    log_sum = sum_exp.log()
    return (label_logits.sum(dim=0) - maximum) - log_sum, log_sum - mean_z, (maximum, sum_exp, mean_z)


def _gather(partials: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather [4, T] from every rank into [tp, 4, T]: the only collective."""
    if group is None or dist.get_world_size(group) == 1:
        return partials.unsqueeze(0)
    tp = dist.get_world_size(group)
    gathered = partials.repeat(tp, 1)
    dist.all_gather_into_tensor(gathered, partials, group=group)
    return gathered.view(tp, *partials.shape)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: _Shard) -> tuple[Tensor, Tensor]:
        partials = _partials(hidden, weight[: shard.num_rows], labels, shard)
        log_probs, entropy, softmax = _combine(_gather(partials, shard.group))
        ctx.save_for_backward(hidden, weight, labels, *softmax)
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, labels, *softmax = ctx.saved_tensors
        shard: _Shard = ctx.shard
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        # float32 even for bfloat16 weights, so that the sum over the slices is rounded to bfloat16 only once
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        if shard.num_rows and not (grad_log_probs is None and grad_entropy is None):
            rows = weight[: shard.num_rows]
            grad_rows = None if grad_weight is None else grad_weight[: shard.num_rows]
            buffers = shard.buffer(hidden), None if grad_entropy is None else shard.buffer(hidden)
            for part in shard.slices(len(labels)):
                z = shard.logits(hidden[part], rows, buffers[0])
                upstream = [
                    None if grad is None else grad[part].unsqueeze(1) for grad in (grad_log_probs, grad_entropy)
                ]
                columns = [column[part].unsqueeze(1) for column in softmax]
                grad_z = _grad_logits(z, buffers[1], labels[part], shard, upstream, columns).to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad_z, rows, out=grad_hidden[part])
                if grad_rows is not None:
                    _add_product(grad_rows, grad_z.t(), hidden[part])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _grad_logits(
    z: Tensor,
    exp_buffer: Tensor | None,
    labels: Tensor,
    shard: _Shard,
    upstream: list[Tensor | None],
    softmax: list[Tensor],
) -> Tensor:
    """Compute the gradient (g (1[v = label] - p_v) - h p_v (log p_v + entropy)) / temperature, in place of z [t, V/tp].

    g and h are the upstream gradients; they and M, S and mean_z of `softmax` are [t, 1]. With p = exp(z - M) / S and
    log p + entropy = (z - M) - mean_z, no sum of M and log S is rounded; 1 / S is part of the row's factor.
    """
    grad_log_probs, grad_entropy = upstream
    maximum, sum_exp, mean_z = softmax
    z.sub_(maximum)
    factor = 1 / (sum_exp * shard.temperature)
    if grad_entropy is None or exp_buffer is None:
        assert grad_log_probs is not None
        grad = z.exp_().mul_(-grad_log_probs * factor)
    else:
        exp_z = torch.exp(z, out=exp_buffer[: len(z)])
        constant = grad_entropy * mean_z if grad_log_probs is None else grad_entropy * mean_z - grad_log_probs
        grad = z.mul_(-grad_entropy * factor).add_(constant * factor).mul_(exp_z)
    if grad_log_probs is not None:
        rows, here = shard.local_labels(labels)
        grad.scatter_add_(1, rows, torch.where(here, grad_log_probs / shard.temperature, 0.0))
    return grad


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the float32 tensor `total`, directly or via a product in the operands' dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))

"""Core attention over packed rows without Transformer Engine.

Takes what Transformer Engine's attention takes (`PackedSeqParams`, thd) and computes, per sequence,
softmax(q k^T * scale) v with a causal mask inside the sequence and nothing across sequences. Megatron's own module
does not support packed rows (dot_product_attention.py:153).

On CUDA one flash kernel computes the row (flash_attention.py) if it supports the dtype and the head dimensions. In all
other cases, and on CPU, sequences are gathered into batches of similar length, padded to at most twice their length,
and go through torch's fused attention.

Memory: no [T, T] matrix exists. Asserted by tests/unit/policy/modules/test_packed_attention.py.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.policy.megatron_patches import cpu
from grpo_mega.policy.modules.allocation import allocation_device
from grpo_mega.policy.modules.context_parallel_attention import add_sinks, attend, context_attention
from grpo_mega.policy.modules.flash_attention import LARGEST_WIDTH, Spans, can_use_flash, flash_attention
from grpo_mega.policy.modules.flash_context_attention import flash_context_attention
from grpo_mega.policy.modules.gathered_attention import ContextRow

cpu.prepare_import()

from megatron.core.models.backends import LocalSpecProvider  # noqa: E402 - only after prepare_import
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.utils import (  # noqa: E402
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LengthBatch:
    """Sequences of similar length, B of at most L tokens.

    `index` [B, L] points into the row; places after the end of a sequence repeat its last token. `kept` lists the
    other places in flattened [B * L]; `targets` are their positions in the row.
    """

    index: Tensor
    kept: Tensor
    targets: Tensor


def length_batches(cu_seqlens: Tensor) -> tuple[LengthBatch, ...]:
    """Split a packed row into batches whose longest sequence is less than twice as long as the shortest."""
    return _length_batches(tuple(cu_seqlens.tolist()), cu_seqlens.device)


@functools.lru_cache(maxsize=16)  # used by all layers of a row
def _length_batches(cu_seqlens: tuple[int, ...], device: torch.device) -> tuple[LengthBatch, ...]:
    by_size: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(cu_seqlens):
        if end > start:
            by_size.setdefault((end - start).bit_length(), []).append((start, end))
    batches = []
    for _, spans in sorted(by_size.items()):
        starts = torch.tensor([s for s, _ in spans], device=device)
        lengths = torch.tensor([e - s for s, e in spans], device=device)
        places = torch.arange(max(e - s for s, e in spans), device=device)
        index = starts[:, None] + torch.minimum(places[None], lengths[:, None] - 1)
        kept = (places[None] < lengths[:, None]).flatten().nonzero().squeeze(1)
        batches.append(LengthBatch(index, kept, index.flatten()[kept]))
    return tuple(batches)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    *,
    sinks: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Causal attention inside each sequence of a packed row.

    Args:
        q: [T, n, d].
        k: [T, m, d], n a multiple of m (grouped queries).
        v: [T, m, e]; e may differ from d.
        cu_seqlens: [B + 1], from 0 to T.
        scale: of the logits; None: 1 / sqrt(d).
        sinks: [n] logits of an additional key with value 0 (attention sink); None: no sink.
        window: tokens that a query sees, itself included; 0: all before it.
    Returns:
        [T, n, e].
    """
    total, heads, width = q.size(0), q.size(1), v.size(2)
    if int(cu_seqlens[-1]) != total:
        raise AssertionError(f"cu_seqlens ends at {int(cu_seqlens[-1])}, the row has {total} tokens")
    if sinks is not None:
        q, k, scale = add_sinks(q, k, sinks, scale)
    grouped = heads != k.size(1)
    batches = length_batches(cu_seqlens)
    outputs = []
    for batch in batches:
        qb, kb, vb = (_gather(x, batch.index).transpose(1, 2) for x in (q, k, v))  # [B, n, L, d]
        if sinks is None and not window:
            out = torch.nn.functional.scaled_dot_product_attention(
                qb, kb, vb, is_causal=True, scale=scale, enable_gqa=grouped
            )
        else:
            out = attend(
                qb, kb, vb, _causal_mask(batch.index.size(1), window, q.device), scale, sinks=sinks is not None
            )
        outputs.append(out.transpose(1, 2).reshape(-1, heads, width)[batch.kept])
    order = torch.cat([b.targets for b in batches])
    return q.new_empty(total, heads, width).index_copy(0, order, torch.cat(outputs))


def _causal_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return a mask [L, L] that is True where a query sees a key."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window) if window else seen


def _gather(x: Tensor, index: Tensor) -> Tensor:
    # index_select: its backward adds rows in place, that of x[index] sorts the index first
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


class PackedAttention(torch.nn.Module):
    """Megatron's core-attention module for packed rows. Its only parameters are attention sinks, if the model has
    them."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, *_: Any, softmax_scale: float | None = None,
        pg_collection: Any = None, **__: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale, self.window = softmax_scale, 0
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            assert config.window_size is not None, "a layer with a window knows its size"
            self.window = config.window_size[0] + 1
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            empty = torch.empty(heads, dtype=config.params_dtype, device=allocation_device(config))
            self.softmax_offset = torch.nn.Parameter(empty)
            set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)
        self.cp_group: dist.ProcessGroup | None = getattr(pg_collection, "cp", None)
        self._logs_kernel = layer_number == 1

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, _mask: Any = None, *_: Any,
        packed_seq_params: PackedSeqParams | None = None, **__: Any,
    ) -> Tensor:  # fmt: skip
        if packed_seq_params is None:
            raise AssertionError("the policy always packs; rows without packed_seq_params do not occur")
        bounds, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        sinks, window, uses_flash = self.softmax_offset, self.window, can_use_flash(q, v)
        self._log_kernel(q, v, uses_flash=uses_flash)
        if self.cp_group is not None and self.cp_group.size() > 1:
            attention = flash_context_attention if uses_flash else context_attention
            out = attention(q, k, v, ContextRow(bounds, longest, self.scale, self.cp_group, window), sinks=sinks)
        elif uses_flash:
            spans = Spans(bounds, bounds, longest, longest)
            out = flash_attention(q, k, v, spans, self.scale, sinks=sinks, window=window)
        else:
            out = packed_attention(q, k, v, bounds, self.scale, sinks=sinks, window=window)
        return out.flatten(1)

    def _log_kernel(self, q: Tensor, v: Tensor, *, uses_flash: bool) -> None:
        """Log once, for the first layer, which attention a GPU computes, and why it is not the flash kernel."""
        if self._logs_kernel and q.device.type == "cuda":
            self._logs_kernel = False
            if uses_flash:
                _log.info("attention of packed rows: flash kernel")
            else:
                _log.warning(
                    "attention of packed rows: batches of sequences of similar length, which is slower than the flash "
                    "kernel; that one needs 16-bit values and equal head dimensions (a multiple of 8, at most %d) on a "
                    "GPU of compute capability 8.0 or higher, and these are %s, %d and %d",
                    LARGEST_WIDTH, str(q.dtype).removeprefix("torch."), q.size(-1), v.size(-1),
                )  # fmt: skip

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return the sharded attention sinks."""
        del metadata
        state = self.state_dict(prefix="", keep_vars=True)
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, dict.fromkeys(state, 0), sharded_offsets
        )
        return found


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, in float32.

    Megatron's own wrapper of torch's does not support sequence parallelism (torch_norm.py:32); the tag on the weight
    makes Megatron sum its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=allocation_device(config))
        self.weight = torch.nn.Parameter(ones)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x.float(), (x.size(-1),), self.weight.float(), self.eps).to(x.dtype)


class PackedSpecProvider(LocalSpecProvider):
    """Megatron's local modules with `RMSNorm` and `PackedAttention`."""

    def layer_norm(self, *_: Any, **__: Any) -> type:
        """Return the class of every norm."""
        return RMSNorm

    def core_attention(self) -> type:
        """Return the class of the core attention."""
        return PackedAttention

"""A hand-written table of where vLLM keeps each checkpoint slice of the dense families, as reference for recordings.

vLLM fuses q, k, v into `qkv_proj` and gate, up into `gate_up_proj`, and splits those by output rows. It splits `o_proj`
and `down_proj` by input columns. It pads the vocabulary to a multiple of 64 before it splits embedding and head. If
there are fewer KV heads than ranks, each rank has one whole head. Every local slice spans whole rows of its parameter.

Asserted by tests/unit/engines/vllm/test_tp_rules.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from grpo_mega.engines.vllm.tp_rules import check_tp, padded_vocab
from grpo_mega.interfaces import RegionKind, SinkRegion
from grpo_mega.models.kv_cache_memory import local_kv_heads
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import Placement, TensorSlice


def engine_layout(spec: ModelSpec, tp: int, tp_rank: int, *, packed_head: bool) -> list[SinkRegion]:
    """Return the regions of rank `tp_rank` of an engine of `tp` ranks, in checkpoint order.

    Args:
        spec: the model, from its config.json.
        packed_head: the engine computes logits from a repacked copy of the head's weight (vLLM on CPU).

    Raises:
        UserError: `tp` does not fit the model.
    """
    check_tp(spec, tp)
    head: RegionKind = "derived" if packed_head else "plain"
    table = _Table(tp, tp_rank)
    regions = [*table.vocab("model.embed_tokens.weight", spec, head if spec.tie_embeddings else "plain")]
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        regions += table.attention(f"{prefix}.self_attn", spec)
        regions += table.mlp(f"{prefix}.mlp", spec)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            regions += table.whole(f"{prefix}.{norm}.weight", (spec.hidden_size,))
    regions += table.whole("model.norm.weight", (spec.hidden_size,))
    if not spec.tie_embeddings:
        regions += table.vocab("lm_head.weight", spec, head)
    return regions


@dataclass(frozen=True)
class _Table:
    tp: int
    tp_rank: int

    def vocab(self, name: str, spec: ModelSpec, kind: RegionKind) -> Iterator[SinkRegion]:
        """Yield the rows of embedding or head on this rank without padding; nothing if all its rows are padding."""
        rows = padded_vocab(spec) // self.tp
        start = self.tp_rank * rows
        count = min(rows, spec.vocab_size - start)
        if count > 0:
            yield _rows(name, name, start, 0, (count, spec.hidden_size), kind)

    def attention(self, prefix: str, spec: ModelSpec) -> Iterator[SinkRegion]:
        q_rows = spec.num_heads // self.tp * spec.head_dim
        kv_rows = local_kv_heads(spec, self.tp) * spec.head_dim
        # With fewer KV heads than ranks, tp / num_kv_heads consecutive ranks share one.
        kv_start = self.tp_rank * spec.num_kv_heads // self.tp * spec.head_dim
        parts = (
            ("q_proj", self.tp_rank * q_rows, q_rows),
            ("k_proj", kv_start, kv_rows),
            ("v_proj", kv_start, kv_rows),
        )
        yield from _fused(prefix, "qkv_proj", parts, "weight", (spec.hidden_size,))
        if spec.qkv_bias:
            yield from _fused(prefix, "qkv_proj", parts, "bias", ())
        yield from self._columns(f"{prefix}.o_proj", spec.hidden_size, q_rows)
        if spec.qk_norm:
            for norm in ("q_norm", "k_norm"):
                yield from self.whole(f"{prefix}.{norm}.weight", (spec.head_dim,))

    def mlp(self, prefix: str, spec: ModelSpec) -> Iterator[SinkRegion]:
        rows = spec.ffn_size // self.tp
        parts = (("gate_proj", self.tp_rank * rows, rows), ("up_proj", self.tp_rank * rows, rows))
        yield from _fused(prefix, "gate_up_proj", parts, "weight", (spec.hidden_size,))
        yield from self._columns(f"{prefix}.down_proj", spec.hidden_size, rows)

    def whole(self, name: str, shape: tuple[int, ...]) -> Iterator[SinkRegion]:
        """Yield a tensor that every rank holds."""
        yield _rows(name, name, 0, 0, shape, "plain")

    def _columns(self, module: str, rows: int, columns: int) -> Iterator[SinkRegion]:
        """Yield a linear layer that is split along its input."""
        name = f"{module}.weight"
        hf = TensorSlice(name, (0, self.tp_rank * columns), (rows, columns))
        yield SinkRegion(Placement(hf, TensorSlice(name, (0, 0), (rows, columns))), "plain", torch.float32)


def _fused(
    prefix: str, fused: str, parts: tuple[tuple[str, int, int], ...], tensor: str, trailing: tuple[int, ...]
) -> Iterator[SinkRegion]:
    """Yield `parts` (HF module, first row, number of rows), stacked in the parameter of `fused`."""
    local_start = 0
    for part, start, rows in parts:
        names = f"{prefix}.{part}.{tensor}", f"{prefix}.{fused}.{tensor}"
        yield _rows(*names, start, local_start, (rows, *trailing), "plain")
        local_start += rows


def _rows(hf: str, local: str, hf_start: int, local_start: int, shape: tuple[int, ...], kind: RegionKind) -> SinkRegion:
    """Return the region from row `hf_start` of the checkpoint tensor to row `local_start` of the parameter."""
    zeros = (0,) * (len(shape) - 1)
    source, target = TensorSlice(hf, (hf_start, *zeros), shape), TensorSlice(local, (local_start, *zeros), shape)
    return SinkRegion(Placement(source, target), kind, torch.float32)

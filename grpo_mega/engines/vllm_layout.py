"""Where vLLM keeps each slice of a Hugging Face checkpoint, for the dense families: a written table, pure.

vLLM fuses q, k, v into `qkv_proj` and gate, up into `gate_up_proj`, splits those by output rows and `o_proj`,
`down_proj` by input columns, pads the vocabulary to a multiple of 64 before it splits embedding and head, and gives
each rank one whole KV head when there are fewer of them than ranks. Every local box spans whole rows of its parameter.

Invariants (tests/unit/test_vllm_layout.py): a rank's regions cover its parameters exactly once, but for the padding of
the vocabulary; over the ranks of an engine every element of the checkpoint is covered once, replicated ones `tp` times
(a KV head: `tp / num_key_value_heads` times).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_mega.interfaces import RegionKind, SinkRegion
from grpo_mega.types import Placement, TensorSlice, UserError

VOCAB_PADDING = 64  # vLLM pads embedding and head to a multiple of this, whatever tp is


@dataclass(frozen=True)
class DenseFamily:
    """What differs between the families; a bias is present always, never, or when the config key says so."""

    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str
    head_norms: bool


FAMILIES: dict[str, DenseFamily] = {
    "Qwen3ForCausalLM": DenseFamily(qkv_bias=False, o_bias=False, mlp_bias=False, head_norms=True),
    "Qwen2ForCausalLM": DenseFamily(qkv_bias=True, o_bias=False, mlp_bias=False, head_norms=False),
    "LlamaForCausalLM": DenseFamily(
        qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias", head_norms=False
    ),
}


@dataclass(frozen=True)
class DenseShape:
    """The sizes of a dense checkpoint that its layout depends on, and which biases it has."""

    num_layers: int
    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    head_norms: bool

    def local_kv_heads(self, tp: int) -> int:
        """KV heads on each rank of an engine."""
        return max(1, self.num_kv_heads // tp)


def read_shape(config: Mapping[str, Any]) -> DenseShape:
    """The shape of the checkpoint that `config` (the content of config.json) describes.

    Raises:
        UserError: no table for the architecture; quantised weights; biases that the engine's model does not have.
    """
    architecture = architecture_of(config)
    family = FAMILIES[architecture]
    if config.get("quantization_config"):
        raise UserError(
            f"model.path: quantization_config={config['quantization_config']} of config.json: the engine is filled "
            "with the policy's own weights, which are not quantised; use the unquantised checkpoint"
        )
    if architecture == "Qwen3ForCausalLM" and config.get("attention_bias"):
        raise UserError(
            "model.path: attention_bias=true of config.json: vLLM's Qwen3 has no bias in o_proj; use a "
            "checkpoint without"
        )

    def has(bias: bool | str) -> bool:
        return bias if isinstance(bias, bool) else bool(config.get(bias, False))

    hidden, num_heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    return DenseShape(
        num_layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        ffn=int(config["intermediate_size"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or hidden // num_heads),
        vocab=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=has(family.qkv_bias),
        o_bias=has(family.o_bias),
        mlp_bias=has(family.mlp_bias),
        head_norms=family.head_norms,
    )


def architecture_of(config: Mapping[str, Any]) -> str:
    """The architecture that config.json names, if there is a table for it.

    Raises:
        UserError: there is none.
    """
    names = config.get("architectures") or [None]
    if names[0] not in FAMILIES:
        raise UserError(
            f"model.path: architectures={names} of config.json has no table of vLLM's weight layout; "
            f"use one of {', '.join(FAMILIES)}"
        )
    return str(names[0])


def check_tp(shape: DenseShape, tp: int) -> None:
    """Raises:
    UserError: vLLM cannot split this model over `tp` ranks.
    """
    sizes = {
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.ffn,
        f"the vocabulary padded to {VOCAB_PADDING}": _padded_vocab(shape),
    }
    for name, size in sizes.items():
        if size % tp:
            raise UserError(f"engine.tp={tp} does not divide {name}={size}; use a divisor of it")
    if max(tp, shape.num_kv_heads) % min(tp, shape.num_kv_heads):
        raise UserError(
            f"engine.tp={tp} neither divides num_key_value_heads={shape.num_kv_heads} nor is a multiple of it; "
            "use a divisor or a multiple"
        )


def engine_layout(config: Mapping[str, Any], tp: int, tp_rank: int, *, packed_head: bool) -> list[SinkRegion]:
    """The regions of rank `tp_rank` of an engine of `tp` ranks, in the order of the checkpoint.

    Args:
        config: the content of config.json.
        packed_head: the engine computes logits from a repacked copy of the head's weight (vLLM on CPU).

    Raises:
        UserError: no table for the architecture, or `tp` does not fit the model.
    """
    shape = read_shape(config)
    check_tp(shape, tp)
    head: RegionKind = "derived" if packed_head else "plain"
    table = _Table(tp, tp_rank)
    regions = [*table.vocab("model.embed_tokens.weight", shape, head if shape.tied else "plain")]
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        regions += table.attention(f"{prefix}.self_attn", shape)
        regions += table.mlp(f"{prefix}.mlp", shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            regions += table.whole(f"{prefix}.{norm}.weight", (shape.hidden,))
    regions += table.whole("model.norm.weight", (shape.hidden,))
    if not shape.tied:
        regions += table.vocab("lm_head.weight", shape, head)
    return regions


@dataclass(frozen=True)
class _Table:
    tp: int
    tp_rank: int

    def vocab(self, name: str, shape: DenseShape, kind: RegionKind) -> Iterator[SinkRegion]:
        """Embedding or head: this rank's share of the padded vocabulary, without the padding (maybe nothing)."""
        rows = _padded_vocab(shape) // self.tp
        start = self.tp_rank * rows
        count = min(rows, shape.vocab - start)
        if count > 0:
            yield _rows(name, name, start, 0, (count, shape.hidden), kind)

    def attention(self, prefix: str, shape: DenseShape) -> Iterator[SinkRegion]:
        q_rows = shape.num_heads // self.tp * shape.head_dim
        kv_rows = shape.local_kv_heads(self.tp) * shape.head_dim
        # Fewer KV heads than ranks: tp / num_kv_heads neighbours share one.
        kv_start = self.tp_rank * shape.num_kv_heads // self.tp * shape.head_dim
        parts = (
            ("q_proj", self.tp_rank * q_rows, q_rows),
            ("k_proj", kv_start, kv_rows),
            ("v_proj", kv_start, kv_rows),
        )
        for tensor, trailing in _weight_and_bias(shape.hidden, shape.qkv_bias):
            yield from _fused(prefix, "qkv_proj", parts, tensor, trailing)
        yield from self._columns(f"{prefix}.o_proj", shape.hidden, q_rows, shape.o_bias)
        if shape.head_norms:
            for norm in ("q_norm", "k_norm"):
                yield from self.whole(f"{prefix}.{norm}.weight", (shape.head_dim,))

    def mlp(self, prefix: str, shape: DenseShape) -> Iterator[SinkRegion]:
        rows = shape.ffn // self.tp
        parts = (("gate_proj", self.tp_rank * rows, rows), ("up_proj", self.tp_rank * rows, rows))
        for tensor, trailing in _weight_and_bias(shape.hidden, shape.mlp_bias):
            yield from _fused(prefix, "gate_up_proj", parts, tensor, trailing)
        yield from self._columns(f"{prefix}.down_proj", shape.hidden, rows, shape.mlp_bias)

    def whole(self, name: str, shape: tuple[int, ...]) -> Iterator[SinkRegion]:
        """A tensor that every rank holds."""
        yield _rows(name, name, 0, 0, shape, "plain")

    def _columns(self, module: str, rows: int, columns: int, bias: bool) -> Iterator[SinkRegion]:
        """A linear split along its input; its bias is whole on every rank, and added on the first."""
        name = f"{module}.weight"
        hf = TensorSlice(name, (0, self.tp_rank * columns), (rows, columns))
        yield SinkRegion(Placement(hf, TensorSlice(name, (0, 0), (rows, columns))), "plain")
        if bias:
            yield from self.whole(f"{module}.bias", (rows,))


def _padded_vocab(shape: DenseShape) -> int:
    return -(-shape.vocab // VOCAB_PADDING) * VOCAB_PADDING


def _weight_and_bias(columns: int, bias: bool) -> list[tuple[str, tuple[int, ...]]]:
    return [("weight", (columns,)), *([("bias", ())] if bias else [])]


def _fused(
    prefix: str, fused: str, parts: tuple[tuple[str, int, int], ...], tensor: str, trailing: tuple[int, ...]
) -> Iterator[SinkRegion]:
    """The `parts` (HF module, its first row, number of rows), one below the other in the parameter of `fused`."""
    local_start = 0
    for part, start, rows in parts:
        names = f"{prefix}.{part}.{tensor}", f"{prefix}.{fused}.{tensor}"
        yield _rows(*names, start, local_start, (rows, *trailing), "plain")
        local_start += rows


def _rows(hf: str, local: str, hf_start: int, local_start: int, shape: tuple[int, ...], kind: RegionKind) -> SinkRegion:
    """`shape[0]` whole rows, from row `hf_start` of the checkpoint's tensor to row `local_start` of the parameter."""
    zeros = (0,) * (len(shape) - 1)
    source, target = TensorSlice(hf, (hf_start, *zeros), shape), TensorSlice(local, (local_start, *zeros), shape)
    return SinkRegion(Placement(source, target), kind)

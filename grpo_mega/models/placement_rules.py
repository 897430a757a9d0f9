"""Rules that build one Megatron parameter from rectangular pieces of Hugging Face tensors.

Every rule gives the Hugging Face tensors that it reads. For a tensor-parallel rank it also gives the slice of a tensor
for each region of the rank's parameter. Loading, saving, weight sync and planning use these rules.
Pure arithmetic. Asserted by tests/unit/models/test_parameter_tables.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import Placement, TensorSlice

Shape = tuple[int, ...]


class Rule(Protocol):
    """Rule of one Megatron parameter.

    Names can contain `{layer}` and `{expert}`. `tp` is the tensor parallelism of the layer; for experts it is etp.
    """

    def hf_shapes(self, spec: ModelSpec) -> dict[str, Shape]:
        """Return template of the Hugging Face name -> shape."""
        ...

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        """Yield (Hugging Face name, offsets in it, offsets in the local parameter, shape) of each piece."""
        ...


@dataclass(frozen=True)
class Copy:
    """One tensor, divided along `axis` over the tensor-parallel ranks, or replicated (None)."""

    hf: str
    shape: Shape
    axis: int | None

    def hf_shapes(self, spec: ModelSpec) -> dict[str, Shape]:
        """Return the tensor."""
        return {self.hf: self.shape}

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        """Yield one piece."""
        zeros = (0,) * len(self.shape)
        if self.axis is None:
            yield self.hf, zeros, zeros, self.shape
            return
        size = self.shape[self.axis] // tp
        yield (
            self.hf,
            _replace_dim(zeros, self.axis, tp_rank * size),
            zeros,
            _replace_dim(self.shape, self.axis, size),
        )


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary, padded at the end to a multiple of tp; the padding has no Hugging Face tensor."""

    hf: str

    def hf_shapes(self, spec: ModelSpec) -> dict[str, Shape]:
        """Return the tensor, without padding."""
        return {self.hf: (spec.vocab_size, spec.hidden_size)}

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        """Yield one piece, or none on a rank that holds only padding."""
        size = padded_vocab(spec.vocab_size, tp) // tp
        rows = min(spec.vocab_size - tp_rank * size, size)
        if rows > 0:
            yield self.hf, (tp_rank * size, 0), (0, 0), (rows, spec.hidden_size)


@dataclass(frozen=True)
class Stacked:
    """Several tensors stacked by rows, each divided by rows: a rank holds [gate shard; up shard]."""

    hf: tuple[str, ...]
    rows: int
    columns: int

    def hf_shapes(self, spec: ModelSpec) -> dict[str, Shape]:
        """Return the tensors, all of the same shape."""
        return dict.fromkeys(self.hf, (self.rows, self.columns))

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        """Yield one piece of each tensor."""
        size = self.rows // tp
        for i, name in enumerate(self.hf):
            yield name, (tp_rank * size, 0), (i * size, 0), (size, self.columns)


@dataclass(frozen=True)
class Interleaved:
    """Query, key and value, interleaved by KV head: [queries; key; value] of one KV head after the other."""

    query: str
    key: str
    value: str
    bias: bool

    def hf_shapes(self, spec: ModelSpec) -> dict[str, Shape]:
        """Return query, key and value."""
        tail = () if self.bias else (spec.hidden_size,)
        kv = (spec.num_kv_heads * spec.head_dim, *tail)
        return {self.query: (spec.num_heads * spec.head_dim, *tail), self.key: kv, self.value: kv}

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        """Yield three pieces for each KV head of the rank."""
        tail = () if self.bias else (spec.hidden_size,)
        zeros = () if self.bias else (0,)
        kv_heads = spec.num_kv_heads // tp
        query_rows = spec.num_heads // spec.num_kv_heads * spec.head_dim
        block = query_rows + 2 * spec.head_dim
        for local in range(kv_heads):
            head = tp_rank * kv_heads + local
            parts = ((self.query, query_rows, 0), (self.key, spec.head_dim, query_rows))
            for name, rows, start in (*parts, (self.value, spec.head_dim, query_rows + spec.head_dim)):
                yield name, (head * rows, *zeros), (local * block + start, *zeros), (rows, *tail)


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Return the smallest multiple of tp that holds the vocabulary."""
    return -(-vocab_size // tp) * tp


def placements(
    rule: Rule, spec: ModelSpec, parameter: str, tp: int, tp_rank: int, *, layer: int = 0, expert: int = 0
) -> list[Placement]:
    """Return the pieces of one local parameter, with layer and expert filled into the names."""
    return [
        Placement(
            TensorSlice(name.format(layer=layer, expert=expert), there, shape), TensorSlice(parameter, here, shape)
        )
        for name, there, here, shape in rule.pieces(spec, tp, tp_rank)
    ]


def _replace_dim(shape: Shape, axis: int, value: int) -> Shape:
    return (*shape[:axis], value, *shape[axis + 1 :])

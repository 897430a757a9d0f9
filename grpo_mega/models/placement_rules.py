"""How one Megatron parameter is made of Hugging Face tensors: rectangular pieces, nothing else.

Every rule answers two questions: which Hugging Face tensors it reads, and, for a tensor-parallel rank, which slice of
which of them is which region of the rank's parameter. Loading, saving, weight sync and planning all use these answers.
Pure; asserted by tests/unit/models/test_parameter_tables.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import Placement, TensorSlice

Shape = tuple[int, ...]


class Rule(Protocol):
    """One parameter of Megatron. Names may hold `{layer}` and `{expert}`; `tp` is the tensor parallelism of the layer:
    for experts that of the experts."""

    def hf_shapes(self, spec: ModelSpec) -> dict[str, Shape]:
        """Template of the Hugging Face name -> shape."""
        ...

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        """(hf name, offsets in it, offsets in the local parameter, shape) of each rectangular piece."""
        ...


@dataclass(frozen=True)
class Copy:
    """The tensor itself, cut along `axis` over the tensor-parallel ranks, or replicated."""

    hf: str
    shape: Shape
    axis: int | None

    def hf_shapes(self, spec: ModelSpec) -> dict[str, Shape]:
        """One."""
        return {self.hf: self.shape}

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        """One."""
        zeros = (0,) * len(self.shape)
        if self.axis is None:
            yield self.hf, zeros, zeros, self.shape
            return
        size = self.shape[self.axis] // tp
        yield (
            self.hf,
            _set(zeros, self.axis, tp_rank * size),
            zeros,
            _set(self.shape, self.axis, size),
        )


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary, padded at the end to a multiple of tp; the padding belongs to nobody's tensor."""

    hf: str

    def hf_shapes(self, spec: ModelSpec) -> dict[str, Shape]:
        """One, un-padded."""
        return {self.hf: (spec.vocab_size, spec.hidden_size)}

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        """At most one; none on a rank that holds only padding."""
        size = padded_vocab(spec.vocab_size, tp) // tp
        rows = min(spec.vocab_size - tp_rank * size, size)
        if rows > 0:
            yield self.hf, (tp_rank * size, 0), (0, 0), (rows, spec.hidden_size)


@dataclass(frozen=True)
class Stacked:
    """Several tensors one below the other, each cut along its rows: a rank holds [gate shard; up shard]."""

    hf: tuple[str, ...]
    rows: int
    columns: int

    def hf_shapes(self, spec: ModelSpec) -> dict[str, Shape]:
        """All of the same shape."""
        return dict.fromkeys(self.hf, (self.rows, self.columns))

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        """One of each."""
        size = self.rows // tp
        for i, name in enumerate(self.hf):
            yield name, (tp_rank * size, 0), (i * size, 0), (size, self.columns)


@dataclass(frozen=True)
class Interleaved:
    """Query, key and value, interleaved by key-value head: [q of its heads; k; v] for one head after the other."""

    query: str
    key: str
    value: str
    bias: bool

    def hf_shapes(self, spec: ModelSpec) -> dict[str, Shape]:
        """Three."""
        tail = () if self.bias else (spec.hidden_size,)
        kv = (spec.num_kv_heads * spec.head_dim, *tail)
        return {self.query: (spec.num_heads * spec.head_dim, *tail), self.key: kv, self.value: kv}

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> Iterator[tuple[str, Shape, Shape, Shape]]:
        """Three for each key-value head of the rank."""
        tail = () if self.bias else (spec.hidden_size,)
        zeros = () if self.bias else (0,)
        kv_heads = spec.num_kv_heads // tp
        query_rows = spec.num_heads // spec.num_kv_heads * spec.head_dim
        block = query_rows + 2 * spec.head_dim
        for local in range(kv_heads):
            head = tp_rank * kv_heads + local
            parts = ((self.query, query_rows, 0), (self.key, spec.head_dim, query_rows))
            for name, rows, below in (*parts, (self.value, spec.head_dim, query_rows + spec.head_dim)):
                yield name, (head * rows, *zeros), (local * block + below, *zeros), (rows, *tail)


def padded_vocab(vocab_size: int, tp: int) -> int:
    """The smallest multiple of tp that holds the vocabulary."""
    return -(-vocab_size // tp) * tp


def placements(
    rule: Rule, spec: ModelSpec, parameter: str, tp: int, tp_rank: int, *, layer: int = 0, expert: int = 0
) -> list[Placement]:
    """The pieces of one local parameter, with names filled in."""
    return [
        Placement(
            TensorSlice(name.format(layer=layer, expert=expert), there, shape), TensorSlice(parameter, here, shape)
        )
        for name, there, here, shape in rule.pieces(spec, tp, tp_rank)
    ]


def _set(shape: Shape, axis: int, value: int) -> Shape:
    return (*shape[:axis], value, *shape[axis + 1 :])

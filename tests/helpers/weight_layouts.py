"""Layouts of a small model with every kind of tensor, computed independently of the package's tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grpo_mega.parallel.topology import Coordinates, Topology
from grpo_mega.types import TensorSlice
from grpo_mega.weight_sync.slice_table import RankSliceTable, SentTensor, concatenate, table_of_rank

LAYERS, HIDDEN, FFN, EXPERTS, EXPERT_FFN, VOCAB, HEADS, KV_HEADS, HEAD = 12, 192, 576, 12, 96, 1000, 12, 6, 16
MOE_LAYERS = range(6, 12)


def all_tensors() -> dict[str, SentTensor]:
    """Return all tensors: bf16, and a correction bias in fp32."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"{layer}.norm": (HIDDEN,),
            f"{layer}.q": (HEADS * HEAD, HIDDEN),
            f"{layer}.k": (KV_HEADS * HEAD, HIDDEN),
            f"{layer}.v": (KV_HEADS * HEAD, HIDDEN),
            f"{layer}.o": (HIDDEN, HEADS * HEAD),
        }
        if layer in MOE_LAYERS:
            shapes |= {f"{layer}.router": (EXPERTS, HIDDEN), f"{layer}.bias": (EXPERTS,)}
            for e in range(EXPERTS):
                shapes |= {f"{layer}.{e}.up": (EXPERT_FFN, HIDDEN), f"{layer}.{e}.down": (HIDDEN, EXPERT_FFN)}
        else:
            shapes |= {f"{layer}.up": (FFN, HIDDEN), f"{layer}.down": (HIDDEN, FFN)}
    shapes |= {"norm": (HIDDEN,), "head": (VOCAB, HIDDEN)}
    return {name: SentTensor(shape, 4 if name.endswith("bias") else 2) for name, shape in shapes.items()}


TENSORS = all_tensors()
VOCABULARY = ("embed", "head")


def equal_part(name: str, ways: int, index: int, axis: int) -> Iterator[TensorSlice]:
    """Yield one of equal parts. The vocabulary is padded first, so its last parts may be short or missing."""
    shape = TENSORS[name].shape
    size = -(-shape[axis] // ways)
    assert name in VOCABULARY or shape[axis] % ways == 0, f"{ways} parts of {name} {shape}"
    start, stop = index * size, min((index + 1) * size, shape[axis])
    if start < stop:
        offsets, extent = [0] * len(shape), list(shape)
        offsets[axis], extent[axis] = start, stop - start
        yield TensorSlice(name, tuple(offsets), tuple(extent))


def whole_tensor(name: str) -> Iterator[TensorSlice]:
    yield from equal_part(name, 1, 0, 0)


def policy(topology: Topology) -> RankSliceTable:
    """Return Megatron's layout: layers over pp, rows and columns over tp, experts over ep and etp.

    Interleaved projections are split head by head.
    """
    rows = []
    for rank in range(topology.world_size):
        at = topology.coordinates(rank)
        rows.append(table_of_rank(TENSORS, _policy_slices(topology, at), rank))
    return concatenate(rows)


def _policy_slices(topology: Topology, at: Coordinates) -> Iterator[TensorSlice]:
    per_stage = LAYERS // topology.pp
    if at.pp_rank == 0:
        yield from equal_part("embed", topology.tp, at.tp_rank, 0)
    for layer in range(at.pp_rank * per_stage, (at.pp_rank + 1) * per_stage):
        yield from whole_tensor(f"{layer}.norm")
        for x, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            mine = KV_HEADS // topology.tp
            for kv_head in range(at.tp_rank * mine, (at.tp_rank + 1) * mine):
                yield from equal_part(f"{layer}.{x}", KV_HEADS, kv_head, 0)
            assert heads % KV_HEADS == 0
        yield from equal_part(f"{layer}.o", topology.tp, at.tp_rank, 1)
        if layer not in MOE_LAYERS:
            yield from equal_part(f"{layer}.up", topology.tp, at.tp_rank, 0)
            yield from equal_part(f"{layer}.down", topology.tp, at.tp_rank, 1)
            continue
        yield from whole_tensor(f"{layer}.router")
        yield from whole_tensor(f"{layer}.bias")
        experts = EXPERTS // topology.ep
        for e in range(at.ep_rank * experts, (at.ep_rank + 1) * experts):
            yield from equal_part(f"{layer}.{e}.up", topology.etp, at.etp_rank, 0)
            yield from equal_part(f"{layer}.{e}.down", topology.etp, at.etp_rank, 1)
    if at.pp_rank == topology.pp - 1:
        yield from whole_tensor("norm")
        yield from equal_part("head", topology.tp, at.tp_rank, 0)


@dataclass(frozen=True)
class EngineLayout:
    """Axes of an engine. With `ep`, whole experts are spread over tp x dp ranks; otherwise each is split over tp."""

    tp: int
    dp: int = 1
    ep: bool = False

    def __str__(self) -> str:
        return f"tp{self.tp}dp{self.dp}{'ep' if self.ep else ''}"


def engine(layout: EngineLayout, world_size: int, first_rank: int = 0) -> RankSliceTable:
    """Return vLLM's layout for the engines on `world_size` ranks, from `first_rank` on."""
    size = layout.tp * layout.dp
    one = [table_of_rank(TENSORS, _engine_slices(layout, rank), rank) for rank in range(size)]
    return concatenate([one[rank % size].placed_on([first_rank + rank]) for rank in range(world_size)])


def _engine_slices(layout: EngineLayout, rank: int) -> Iterator[TensorSlice]:
    tp, tp_rank = layout.tp, rank % layout.tp
    for name in TENSORS:
        kind = name.rpartition(".")[2]
        if kind in ("norm", "router", "bias"):
            yield from whole_tensor(name)
        elif kind in VOCABULARY:
            yield from equal_part(name, tp, tp_rank, 0)
        elif kind in "kv" and tp > KV_HEADS:
            yield from equal_part(name, KV_HEADS, tp_rank * KV_HEADS // tp, 0)
        elif name.count(".") == 2 and layout.ep:
            ranks = layout.tp * layout.dp
            if int(name.split(".")[1]) // (EXPERTS // ranks) == rank:
                yield from whole_tensor(name)
        else:
            yield from equal_part(name, tp, tp_rank, 1 if kind in ("o", "down") else 0)

"""Exchange of the policy's and the engines' layouts between all ranks, before a plan is made.

Asserted by tests/parallel/test_sync_ranks.py and tests/parallel/test_sync_fp8_ranks.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from grpo_mega.interfaces import HeldSlice, SinkRegion
from grpo_mega.parallel.peer_group import read_plain
from grpo_mega.types import WeightMismatchError
from grpo_mega.weight_sync.slice_table import (
    RankSliceTable,
    SentTensor,
    concatenate,
    merge_equal_slices,
    num_elements,
    table_of_rank,
)
from grpo_mega.weight_sync.straggler_barrier import StragglerBarrier


@dataclass(frozen=True)
class SyncLayouts:
    """The slices that all ranks hold and need.

    `dtypes` maps each tensor to the dtype in which it is sent, which is the engine's. `held` lists the slices of the
    policy, `wanted` the slices of the engines.
    """

    tensors: dict[str, SentTensor]
    dtypes: dict[str, torch.dtype]
    held: RankSliceTable
    wanted: RankSliceTable


@dataclass(frozen=True)
class _LayoutMessage:
    """The layouts of one rank as it sends them to the others, or the reason `fault` why it cannot.

    `held` and `wanted` are pickled tables without ranks, so that ranks with equal layouts send equal bytes. `quantized`
    maps the tensors that the policy holds in 8-bit dtypes to those dtypes.
    """

    held: bytes
    wanted: bytes
    dtypes: dict[str, torch.dtype]
    quantized: dict[str, torch.dtype] = field(default_factory=dict)
    fault: str | None = None


def exchange_layouts(
    shapes: dict[str, tuple[int, ...]],
    shards: Sequence[HeldSlice],
    regions: Sequence[SinkRegion],
    replicas: Sequence[Sequence[int]],
    barrier: StragglerBarrier,
) -> SyncLayouts:
    """Collective: return the shards and regions of every rank.

    Args:
        shapes: name -> shape of every tensor of the checkpoint.
        shards: the policy's slices on this rank.
        regions: the engine's regions on this rank.
        replicas: ranks of each engine.
        barrier: over all ranks.

    Raises:
        WeightMismatchError: on every rank, with the names of the tensors. An engine needs a tensor that the policy does
            not have, stores no copy of a tensor, needs a tensor in two dtypes, or needs values that the policy holds
            quantized.
    """
    dtypes = dict.fromkeys(shapes, torch.float32)
    messages = barrier.gather(_layout_message(shapes, shards, regions, barrier.rank), "exchanging layouts")
    if faults := [message.fault for message in messages if message.fault]:
        raise WeightMismatchError(
            f"the engine needs tensors that do not match those of the policy: {'; '.join(faults[:3])}"
        )
    for rank, message in enumerate(messages):
        for name, dtype in message.dtypes.items():
            if name in dtypes and any(name in m.dtypes and m.dtypes[name] != dtype for m in messages):
                raise WeightMismatchError(
                    f"engine ranks need {name} in different dtypes (rank {rank} in {dtype}); all must use one dtype"
                )
            dtypes[name] = dtype
    _check_quantized(messages, dtypes)
    tensors = {name: SentTensor(shape, dtypes[name].itemsize) for name, shape in shapes.items()}
    held, wanted = _join_tables([m.held for m in messages]), _join_tables([m.wanted for m in messages])
    layouts = SyncLayouts(tensors, dtypes, held, wanted)
    _check_complete(layouts, replicas)
    return layouts


def _layout_message(
    shapes: dict[str, tuple[int, ...]], shards: Sequence[HeldSlice], regions: Sequence[SinkRegion], rank: int
) -> _LayoutMessage:
    tensors = {name: SentTensor(shape, 1) for name, shape in shapes.items()}
    try:
        held = table_of_rank(tensors, [held.hf for held in shards], rank)
        wanted = table_of_rank(tensors, [region.placement.hf for region in regions], rank)
        return _LayoutMessage(
            pickle.dumps(held.placed_on(())),
            pickle.dumps(wanted.placed_on(())),
            {region.placement.hf.name: region.dtype for region in regions},
            {held.hf.name: held.dtype for held in shards if held.dtype.itemsize == 1},
        )
    except ValueError as error:
        return _LayoutMessage(b"", b"", {}, fault=str(error))


def _check_quantized(messages: Sequence[_LayoutMessage], dtypes: dict[str, torch.dtype]) -> None:
    """Raise if a quantized tensor would be converted: its values have no meaning without their scales."""
    quantized = {name: dtype for message in messages for name, dtype in message.quantized.items()}
    for name, dtype in dtypes.items():
        if name in quantized and dtype != quantized[name]:
            raise WeightMismatchError(
                f"the policy sends quantized values of {name} in {quantized[name]}, but the engine needs it in {dtype}"
            )
        if name not in quantized and dtype.itemsize == 1:
            raise WeightMismatchError(
                f"the engine needs quantized values of {name} in {dtype}, but the policy does not quantize it"
            )


def _join_tables(pickled: Sequence[bytes]) -> RankSliceTable:
    """Return the table of all ranks from `pickled[rank]`; equal tables are unpickled once."""
    ranks_of: dict[bytes, list[int]] = {}
    for rank, each in enumerate(pickled):
        ranks_of.setdefault(each, []).append(rank)
    return concatenate([cast("RankSliceTable", read_plain(each)).placed_on(ranks) for each, ranks in ranks_of.items()])


def _check_complete(layouts: SyncLayouts, replicas: Sequence[Sequence[int]]) -> None:
    """Raise if the ranks of an engine do not store every element of every tensor."""
    names = list(layouts.tensors)
    full = [int(torch.Size(tensor.shape).numel()) for tensor in layouts.tensors.values()]
    for ranks in replicas:
        slices = merge_equal_slices(layouts.wanted.rows_on(ranks))
        stored = [0] * len(names)
        for tensor, size in zip(
            slices.tensors.tolist(), num_elements(slices.starts, slices.ends).tolist(), strict=True
        ):
            stored[tensor] += size
        missing = [f"{names[i]} ({stored[i]} of {full[i]} elements)" for i in range(len(names)) if stored[i] < full[i]]
        if missing:
            raise WeightMismatchError(
                f"the engine of ranks {ranks[0]} to {ranks[-1]} does not store all elements of "
                f"{', '.join(missing[:3])} ({len(missing)} tensors of the policy)"
            )

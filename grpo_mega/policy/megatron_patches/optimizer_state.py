"""Sharded optimizer state in a checkpoint: each rank saves and loads the part that it holds, and nothing else.

Megatron's format `fully_reshardable` (optimizer/distrib_optimizer.py:1690) gathers the whole state of a data-parallel
group on each of its ranks, to save whole parameters, and loads whole parameters to keep a part: 12 bytes per parameter
on every rank, in host memory, and the largest buffer on the device. Its successor without a gather,
`fully_sharded_model_space`, needs flattened ranges, which dist_checkpointing/mapping.py:134 rejects.
Here the range of a parameter that a rank holds becomes a few rectangles (whole rows, and parts of the first and the
last row), which `torch_dist` stores as chunks of the whole tensor. Keys and shapes are those of `fully_reshardable`:
checkpoints of either form load in any layout.
Asserted by tests/unit/policy/megatron_patches/test_optimizer_state.py, tests/parallel/test_optimizer_state.py and
tests/parallel/test_checkpoint.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from grpo_mega.policy.megatron_patches import cpu
from grpo_mega.policy.muon import Muon

cpu.prepare_import()

from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402 - only after prepare_import
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from megatron.core.dist_checkpointing.optimizer import KEEP_VARS_HINT  # noqa: E402
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories  # noqa: E402
from megatron.core.optimizer import distrib_optimizer  # noqa: E402
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

_PREFIX = "optimizer.state"

Shape = tuple[int, ...]


def install() -> None:
    """Replace Megatron's own conversion from and to `fully_reshardable`. Idempotent.

    distrib_optimizer.py:1569 collects the garbage of the whole process after its gather, which takes up to a second of
    each save. There is no gather here, and nothing to collect.
    """
    distrib_optimizer.gc = SimpleNamespace(collect=lambda: 0)
    DistributedOptimizer.sharded_param_state_fully_reshardable = sharded_parameter_state
    DistributedOptimizer.load_parameter_state_from_fully_reshardable = load_parameter_state


def rectangles(start: int, end: int, shape: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Yield (offsets, shape) of rectangles that partition the elements [start, end) of a contiguous tensor, in order.

    At most 2 * dimensions - 1 are needed.
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (end - start,) * len(shape)
        return
    row, inner = math.prod(shape[1:]), shape[1:]
    (first, begin), (last, rest) = divmod(start, row), divmod(end, row)
    if first == last:
        yield from _in_row(first, begin, rest, inner)
        return
    if begin:
        yield from _in_row(first, begin, row, inner)
        first += 1
    if first < last:
        yield (first, *(0,) * len(inner)), (last - first, *inner)
    yield from _in_row(last, 0, rest, inner)


def _in_row(index: int, start: int, end: int, inner: Shape) -> Iterator[tuple[Shape, Shape]]:
    for offsets, shape in rectangles(start, end, inner):
        yield (index, *offsets), (1, *shape)


@functools.wraps(DistributedOptimizer.sharded_param_state_fully_reshardable, assigned=())
def sharded_parameter_state(
    optimizer: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
    """Return parameter -> name of a state -> pieces in float32 of the state that this rank holds.

    Replaces `DistributedOptimizer.sharded_param_state_fully_reshardable`, without a collective. To be saved, pieces are
    views of the state, and zeros for the moments that the optimizer does not have before its first step. To be loaded,
    they are new host memory.
    """
    del metadata
    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    by_parameter = {each.data: each for each in nested_values(sharded)}
    found: dict[int, dict[str, dict[int, ShardedTensor]]] = {}
    for index, (parameter, start, end) in enumerate(_held_ranges(optimizer)):
        if parameter not in by_parameter:
            raise ValueError(f"a parameter is not in the model's sharded state; {KEEP_VARS_HINT}")
        names = ("param", *_moments_of(optimizer, parameter))
        states = {} if is_loading else _states_of(optimizer, parameter)
        found[index] = {}
        for name in names:
            if is_loading:
                state = torch.empty(end - start, device="cpu")
            elif name in states:
                state = states[name].detach().float()
            else:  # before the first step, with which the optimizer begins its moments
                assert name != "param", "the optimizer has no main parameter"
                state = torch.zeros(end - start, device="cpu")
            found[index][name] = dict(enumerate(_pieces(by_parameter[parameter], name, state, start, end)))
    return found


@functools.wraps(DistributedOptimizer.load_parameter_state_from_fully_reshardable, assigned=())
@torch.no_grad()
def load_parameter_state(optimizer: Any, state: dict[int, dict[str, dict[int, Tensor]]]) -> None:
    """Store the loaded pieces. Replaces `DistributedOptimizer.load_parameter_state_from_fully_reshardable`."""
    for index, (parameter, _, _) in enumerate(_held_ranges(optimizer)):
        flat = {name: _joined([pieces[i] for i in sorted(pieces)]) for name, pieces in state[index].items()}
        optimizer._set_main_param_and_optimizer_states(parameter, flat)
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


def _joined(pieces: list[Tensor]) -> Tensor:
    """Return the pieces as one flat tensor, without a copy if they are loaded into the memory of one, in order."""
    end = first = pieces[0].data_ptr()
    for piece in pieces:
        if piece.data_ptr() != end or not piece.is_contiguous():
            return torch.cat([each.flatten() for each in pieces])
        end += piece.nbytes
    whole = pieces[0].untyped_storage()
    if any(piece.untyped_storage()._cdata != whole._cdata for piece in pieces):
        return torch.cat([each.flatten() for each in pieces])
    size = (end - first) // pieces[0].itemsize
    return pieces[0].as_strided((size,), (1,))


def _states_of(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """Return the main parameter and the moments that there are. The optimizer's state is as before."""
    group, order = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][order]
    is_new = main not in optimizer.optimizer.state
    if is_new and optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        # Transformer Engine's Adam makes the main parameter in its first step, from the parameter, and
        # distrib_optimizer.py:1090 would not find it
        return {"param": main.detach().float()}
    states: dict[str, Tensor] = optimizer._get_main_param_and_optimizer_states(parameter)
    if is_new:  # the read has added an empty entry, which placeholder_steps (fixes.py) would take for a state
        optimizer.optimizer.state.pop(main, None)
    return states


def _moments_of(optimizer: Any, parameter: Tensor) -> tuple[str, ...]:
    """Return the names of the moments of a parameter."""
    if not isinstance(optimizer.optimizer, Muon):
        moments: tuple[str, ...] = optimizer.optimizer_state_keys
        return moments
    group, order = optimizer.model_param_group_index_map[parameter]
    return optimizer.optimizer.moments_of(optimizer.optimizer.param_groups[group]["params"][order])


def _held_ranges(optimizer: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Yield (parameter, start, end) of the elements whose state this rank holds."""
    for buckets_by_dtype in optimizer.gbuf_ranges:
        for buckets in buckets_by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _pieces(
    owner: ShardedTensor | ShardedTensorFactory, name: str, state: Tensor, start: int, end: int
) -> Iterator[ShardedTensor]:
    """Yield the pieces of one state, [end - start], of the elements [start, end) of a parameter."""
    flat = state.view(-1)
    assert flat.numel() == end - start, f"{flat.numel()} elements of {owner.key} for [{start}, {end})"
    key = f"{_PREFIX}.{name}.{owner.key}"
    for position, part in _parts(owner, key, state.dtype):
        numel = math.prod(part.local_shape)
        low, high = max(start, position), min(end, position + numel)
        at = low - start
        # each element has one owner among the data-parallel ranks, which are the last coordinate
        replica_id = (*part.replica_id[:2], 0)
        stacked = part.prepend_axis_num
        for offsets, shape in rectangles(low - position, high - position, tuple(part.local_shape)):
            values = flat[at : at + math.prod(shape)].view((1,) * stacked + shape)
            at += values.numel()
            within = (0,) * stacked + offsets
            yield ShardedTensor(
                key=part.key,
                data=values,
                dtype=values.dtype,
                local_shape=tuple(values.shape),
                global_shape=part.global_shape,
                global_offset=tuple(a + b for a, b in zip(part.global_offset, within, strict=True)),
                axis_fragmentations=None,  # the pieces are no regular grid
                replica_id=replica_id,
                allow_shape_mismatch=part.allow_shape_mismatch,
            )


def _parts(
    owner: ShardedTensor | ShardedTensorFactory, key: str, dtype: torch.dtype
) -> Iterator[tuple[int, ShardedTensor]]:
    """Yield (first element, part) of the tensors under which a parameter is stored: itself, or gate and up apart."""
    if isinstance(owner, ShardedTensor):
        assert len(owner.replica_id) == 3, f"replica_id={owner.replica_id} of {owner.key} is not (pp, tp, dp)"
        yield 0, _renamed(owner, key)
        return
    whole = torch.empty(owner.data.shape, dtype=dtype, device="meta")
    for part in owner.build_fn(key, whole, owner.replica_id, None):
        if not part.data.is_contiguous() or part.data.untyped_storage()._cdata != whole.untyped_storage()._cdata:
            raise RuntimeError(
                f"{part.key} is not a contiguous part of {owner.key}; its state cannot be saved in pieces"
            )
        yield part.data.storage_offset(), part


def _renamed(owner: ShardedTensor, key: str) -> ShardedTensor:
    part = owner.without_data()
    part.key = key
    return part

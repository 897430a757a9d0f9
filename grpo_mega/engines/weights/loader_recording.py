"""Records which slice of which checkpoint tensor an engine's own weight loader copies into which parameter.

`load_weights` runs once on meta tensors with the names and shapes of the checkpoint. `recording` intercepts every copy:
the two views, of the checkpoint tensor and of the parameter, tell which slice fills which slice. The copy itself is
skipped. This module contains no knowledge of model structures, so it covers every model that the engine loads, with
fused, stacked, padded or replicated parameters. A copy that is not of slices raises `CannotRecordError`; whole tensors
are streamed to such an engine.
Asserted by tests/engine/test_vllm_record.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_mega.types import TensorSlice

Shape = tuple[int, ...]


class CannotRecordError(RuntimeError):
    """The loader does something other than copying a slice into a slice; the message says what."""


class UnfilledError(CannotRecordError):
    """Part of a parameter is not filled by any tensor of the checkpoint; the message names the parameter."""


@dataclass(frozen=True)
class RecordedCopy:
    """One copy of the loader: the checkpoint slice `hf` fills the slice `local` of a parameter."""

    hf: TensorSlice
    local: TensorSlice
    along: tuple[int, ...]
    """Dimension i of `hf` runs along dimension `along[i]` of the parameter; -1 if it has one element."""
    dtype: torch.dtype
    """Of the parameter."""


@dataclass
class LoaderRecord:
    """The recorded copies, and shape, address and strides of all parameters before the engine processes them."""

    shapes: dict[str, Shape]
    addresses: dict[str, int]
    copies: list[RecordedCopy] = field(default_factory=list)
    zeros: list[TensorSlice] = field(default_factory=list)
    """Slices of parameters that are zero on this rank for any checkpoint, such as a bias that another rank adds."""
    strides: dict[str, Shape] = field(default_factory=dict)
    empty: set[str] = field(default_factory=set)
    """Parameters into which the loader copied a slice without elements: ranks that hold only padding."""


def recording_tensors(tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint on the meta device."""
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in tensors.items()}


def record_loader(
    model: nn.Module,
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
    padded: set[str],
    *,
    preset: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
) -> LoaderRecord:
    """Run `model.load_weights` on meta tensors and return what it copies.

    Args:
        model: the engine's model before loading; its parameters may be on any device, including meta.
        tensors: name -> (shape, dtype) of every tensor of the checkpoint.
        padded: parameters whose last rows may be padding.
        preset: parameters that the engine sets itself if the checkpoint has no tensor for them.
        tied: parameter -> tensor of the checkpoint that it equals. If the loader leaves such a parameter unfilled, its
            own `weight_loader` copies the tensor.

    Raises:
        CannotRecordError: the loader does something other than copying slices.
        UnfilledError: the loader leaves a part of a parameter unfilled, or has no tensor for it.
    """
    sources = recording_tensors(tensors)
    parameters = dict(model.named_parameters())
    targets = {**dict(model.named_buffers()), **parameters}
    record = LoaderRecord(
        {name: tuple(p.shape) for name, p in parameters.items()},
        {name: p.data_ptr() for name, p in targets.items()},
        strides={name: p.stride() for name, p in targets.items()},
    )
    with recording(sources, targets, record):
        loader: Any = model
        try:
            loader.load_weights(iter(sources.items()))
            for name in _unfilled(record, (tied or {}).keys() & parameters.keys()):
                owner: Any = parameters[name]
                owner.weight_loader(owner, sources[(tied or {})[name]])
        except (RuntimeError, NotImplementedError, AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CannotRecordError):
                raise
            raise CannotRecordError(f"{type(model).__name__}.load_weights on meta tensors: {error}") from error
    check_coverage(record, padded, preset)
    return record


def _unfilled(record: LoaderRecord, names: Collection[str]) -> list[str]:
    """Return those of `names` that no tensor of the checkpoint was copied into."""
    filled = {copy.local.name for copy in record.copies} | record.empty
    return sorted(set(names) - filled)


@contextmanager
def recording(sources: Mapping[str, Tensor], targets: Mapping[str, Tensor], record: LoaderRecord) -> Iterator[None]:
    """Record copies from `sources` into `targets` instead of performing them."""
    with _Recorder(sources, targets, record) as recorder:
        yield
    filled: dict[str, list[TensorSlice]] = {}
    for copy in record.copies:
        filled.setdefault(copy.local.name, []).append(copy.local)
    for box in dict.fromkeys(recorder.zeroed):
        if not any(_overlap(box, other) for other in filled.get(box.name, ())):
            record.zeros.append(box)


class _Recorder(TorchDispatchMode):
    def __init__(self, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor], record: LoaderRecord) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources = {_storage(t): (name, t) for name, t in sources.items()}
        self._targets = {_storage(t): (name, t) for name, t in targets.items() if t.numel()}
        self._record = record
        self._cloned: set[int] = set()
        self._zeroed: set[int] = set()
        self.zeroed: list[TensorSlice] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and _storage(args[1]) in self._sources:
            self._record_copy(args[0], args[1])
            return args[0]
        if func is torch.ops.aten._to_copy.default and _storage(args[0]) in self._sources:
            return args[0]  # a copy on another device or in another dtype is the same slice
        if func is torch.ops.aten.clone.default and _storage(args[0]) in self._sources:
            self._cloned.add(_storage(args[0]))
            return args[0]  # and so is a copy in another memory order, such as that of `contiguous`
        written = _written(func, args)
        if written is not None and _storage(written) in self._sources:
            return self._write_to_source(func, written)
        if func is torch.ops.aten.zero_.default and _storage(written) in self._targets:
            self._record_zeros(written)
        if written is not None and not written.numel():
            return func(*args, **kwargs)  # a rank that holds no part of a small tensor
        if written is not None and _storage(written) in self._targets and func not in _FILLS:
            name = self._targets[_storage(written)][0]
            raise CannotRecordError(f"{name} is written by {func}, but not from a slice of the checkpoint")
        return func(*args, **kwargs)

    def _write_to_source(self, func: Any, source: Tensor) -> Tensor:
        """Handle a write into a checkpoint tensor; a loader may only zero a whole tensor before it uses it."""
        storage = _storage(source)
        name, whole = self._sources[storage]
        if func is not torch.ops.aten.zero_.default or source.shape != whole.shape or storage in self._cloned:
            raise CannotRecordError(f"{name} of the checkpoint is changed by {func}")
        self._zeroed.add(storage)
        return source

    def _record_zeros(self, target: Tensor) -> None:
        """Record zeros, which are padding unless the loader also copies a slice there."""
        parameter, owner = self._targets[_storage(target)]
        box = _box(target, owner)
        if target.numel() and box is not None:
            self.zeroed.append(TensorSlice(parameter, *box[0]))

    def _record_copy(self, target: Tensor, source: Tensor) -> None:
        if not target.numel():  # a rank that holds no part of a small vocabulary
            if _storage(target) in self._targets:
                self._record.empty.add(self._targets[_storage(target)][0])
            return
        name, whole = self._sources[_storage(source)]
        if _storage(target) not in self._targets:
            raise CannotRecordError(f"{name} is copied into a tensor that is not a parameter")
        parameter, owner = self._targets[_storage(target)]
        if tuple(target.shape) != tuple(source.shape):
            source = source.expand(target.shape)
        source_box, target_box = _box(source, whole), _box(target, owner)
        if source_box is None or target_box is None:
            raise CannotRecordError(f"{parameter} is not filled by a slice of {name}")
        hf_box, hf_axes = source_box
        box, axes = target_box
        along = [-1] * whole.dim()
        for hf_axis, axis in zip(hf_axes, axes, strict=True):
            if (hf_axis < 0) != (axis < 0):
                raise CannotRecordError(f"{parameter} repeats elements of {name}")
            if hf_axis >= 0:
                along[hf_axis] = axis
        hf, local = TensorSlice(name, *hf_box), TensorSlice(parameter, *box)
        if _storage(source) in self._zeroed:
            self._record.zeros.append(local)
            return
        self._record.copies.append(RecordedCopy(hf, local, tuple(along), owner.dtype))


_FILLS = (torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar)  # of padding


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata) if isinstance(tensor, Tensor) else 0


def _written(func: Any, args: Sequence[Any]) -> Any:
    """Return the tensor that an in-place operation writes; None if there is none."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value
    return None


def _box(view: Tensor, whole: Tensor) -> tuple[tuple[Shape, Shape], tuple[int, ...]] | None:
    """Return the slice of `whole` that `view` covers, or None if it is not a slice.

    The result is (offsets, shape) in `whole` and, for each dimension of `view`, the dimension of `whole` that it runs
    along (-1: one element).
    """
    rest = int(view.storage_offset()) - int(whole.storage_offset())
    strides = [int(stride) for stride in whole.stride()]
    dims = [d for d in range(whole.dim()) if whole.shape[d] > 1]
    offsets, extent = [0] * whole.dim(), [1] * whole.dim()
    for d in sorted(dims, key=lambda d: -strides[d]):
        offsets[d], rest = divmod(rest, strides[d])
    axes = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            axes.append(-1)
            continue
        match = [d for d in dims if strides[d] == stride and extent[d] == 1]
        if not match:
            return None
        extent[match[0]] = size
        axes.append(match[0])
    if rest or any(o + n > s for o, n, s in zip(offsets, extent, whole.shape, strict=True)):
        return None
    return (tuple(offsets), tuple(extent)), tuple(axes)


def check_coverage(record: LoaderRecord, padded: set[str], preset: Collection[str] = ()) -> None:
    """Check that each element of each parameter is filled exactly once, except the last rows of `padded` parameters.

    A padded parameter without any row of a tensor is accepted only if the loader copied an empty slice into it. Without
    such a copy no tensor of the checkpoint belongs to the parameter, and a sync would leave it as it is.

    Raises:
        CannotRecordError: an element is filled twice (names the parameter).
        UnfilledError: an element is not filled (names the parameter).
    """
    boxes: dict[str, list[TensorSlice]] = {}
    for local in [*(copy.local for copy in record.copies), *record.zeros]:
        boxes.setdefault(local.name, []).append(local)
    for name, shape in record.shapes.items():
        found = sorted(boxes.get(name, []), key=lambda box: box.offsets)
        if twice := _first_overlap(found):
            raise CannotRecordError(f"{twice} is filled twice")
        filled = sum(_volume(box.shape) for box in found)
        if filled == _volume(shape) or (not found and name in preset):
            continue
        if not found and name not in record.empty:
            raise UnfilledError(f"no tensor of the checkpoint fills {name} {list(shape)}")
        rows = max((box.offsets[0] + box.shape[0] for box in found), default=0)
        if name not in padded or filled != rows * _volume(shape[1:]):
            raise UnfilledError(f"{filled} of the {_volume(shape)} elements of {name} {list(shape)} are filled")


def _volume(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _first_overlap(boxes: Sequence[TensorSlice]) -> TensorSlice | None:
    """Return a slice that overlaps an earlier one, or None; `boxes` are sorted by their offsets."""
    for i, box in enumerate(boxes):
        for other in boxes[i + 1 :]:
            if other.offsets[0] >= box.offsets[0] + box.shape[0]:
                break  # every later one starts further behind
            if _overlap(box, other):
                return other
    return None


def _overlap(box: TensorSlice, other: TensorSlice) -> bool:
    pairs = zip(box.offsets, box.shape, other.offsets, other.shape, strict=True)
    return all(a < d + m and d < a + n for a, n, d, m in pairs)

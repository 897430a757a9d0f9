"""An engine's own weight loader, run once on stand-ins: which slice of which checkpoint tensor lands where.

`recording` watches every copy while `load_weights` runs on tensors of the checkpoint's names and shapes that have no
storage (the meta device). A copy's two views, the checkpoint's and the parameter's, say which box fills which box; the
copy itself is not made. Nothing here knows a model's structure, so every model that the engine loads is covered, fused,
stacked, padded or replicated. What cannot be expressed as boxes raises `CannotRecordError`: such an engine is streamed.
Asserted by tests/engine/test_vllm_record.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_mega.types import TensorSlice

Shape = tuple[int, ...]


class CannotRecordError(RuntimeError):
    """The loader does something that is no copy of a box into a box; says what."""


class UnfilledError(CannotRecordError):
    """No tensor of the checkpoint fills some part of a parameter; says which."""


@dataclass(frozen=True)
class RecordedCopy:
    """The slice `hf` fills the box `local` of a parameter; dimension i of `hf` runs along dimension `along[i]` of the
    parameter (-1: it has one element)."""

    hf: TensorSlice
    local: TensorSlice
    along: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class LoaderRecord:
    """What was recorded, and shape, address and strides of all parameters before the engine processes them further.
    `zeros`: boxes of parameters that hold zeros on this rank whatever the checkpoint says, as a bias that another rank
    adds."""

    shapes: dict[str, Shape]
    addresses: dict[str, int]
    copies: list[RecordedCopy] = field(default_factory=list)
    zeros: list[TensorSlice] = field(default_factory=list)
    strides: dict[str, Shape] = field(default_factory=dict)


def recording_tensors(tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> dict[str, Tensor]:
    """The checkpoint's tensors without their bytes."""
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in tensors.items()}


def record_loader(model: nn.Module, tensors: Mapping[str, tuple[Shape, torch.dtype]], padded: set[str]) -> LoaderRecord:
    """Run `model.load_weights` on stand-ins.

    Args:
        model: the engine's, as built; its parameters may be on any device, the meta device included.
        tensors: shape and dtype of every tensor of the checkpoint.
        padded: parameters whose last rows may be padding.

    Raises:
        CannotRecordError: see there.
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
        except (RuntimeError, NotImplementedError, AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CannotRecordError):
                raise
            raise CannotRecordError(f"{type(model).__name__}.load_weights on stand-ins: {error}") from error
    check_coverage(record, padded)
    return record


@contextmanager
def recording(sources: Mapping[str, Tensor], targets: Mapping[str, Tensor], record: LoaderRecord) -> Iterator[None]:
    """Inside, copies from `sources` into `targets` are noted instead of made."""
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
            self._note(args[0], args[1])
            return args[0]
        if func is torch.ops.aten._to_copy.default and _storage(args[0]) in self._sources:
            return args[0]  # another device or dtype holds the same slice
        if func is torch.ops.aten.clone.default and _storage(args[0]) in self._sources:
            self._cloned.add(_storage(args[0]))
            return args[0]  # so does a copy in another order, as `contiguous` makes it
        written = _written(func, args)
        if written is not None and _storage(written) in self._sources:
            return self._change(func, written)
        if func is torch.ops.aten.zero_.default and _storage(written) in self._targets:
            self._note_zeros(written)
        if written is not None and not written.numel():
            return func(*args, **kwargs)  # a rank that has nothing of a small tensor
        if written is not None and _storage(written) in self._targets and func not in _FILLS:
            name = self._targets[_storage(written)][0]
            raise CannotRecordError(f"{name} is written by {func}, from something that is no slice of the checkpoint")
        return func(*args, **kwargs)

    def _change(self, func: Any, source: Tensor) -> Tensor:
        """The loader writes into what it was given: it may turn a whole tensor into zeros before it uses it."""
        storage = _storage(source)
        name, whole = self._sources[storage]
        if func is not torch.ops.aten.zero_.default or source.shape != whole.shape or storage in self._cloned:
            raise CannotRecordError(f"{name} of the checkpoint is changed by {func}")
        self._zeroed.add(storage)
        return source

    def _note_zeros(self, target: Tensor) -> None:
        """Padding, unless something is copied there after all."""
        parameter, owner = self._targets[_storage(target)]
        box = _box(target, owner)
        if target.numel() and box is not None:
            self.zeroed.append(TensorSlice(parameter, *box[0]))

    def _note(self, target: Tensor, source: Tensor) -> None:
        if not target.numel():
            return  # a rank that has nothing of a small vocabulary
        name, whole = self._sources[_storage(source)]
        if _storage(target) not in self._targets:
            raise CannotRecordError(f"{name} is copied into a tensor that is no parameter")
        parameter, owner = self._targets[_storage(target)]
        if tuple(target.shape) != tuple(source.shape):
            source = source.expand(target.shape)
        there, here = _box(source, whole), _box(target, owner)
        if there is None or here is None:
            raise CannotRecordError(f"{parameter} is filled from {name} by no box of its own")
        hf_box, hf_axes = there
        box, axes = here
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
    """The tensor that an in-place operation changes."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value
    return None


def _box(view: Tensor, whole: Tensor) -> tuple[tuple[Shape, Shape], tuple[int, ...]] | None:
    """The box of `whole` that `view` is, as (offsets, shape), and for each dimension of `view` the one of `whole` that
    it runs along (-1: one element); None when it is no box."""
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


def check_coverage(record: LoaderRecord, padded: set[str]) -> None:
    """Each element of each parameter is filled once; but for the last rows of `padded` ones.

    Raises:
        CannotRecordError: an element is filled twice (names the parameter).
        UnfilledError: an element is not filled (names the parameter).
    """
    boxes: dict[str, list[TensorSlice]] = {}
    for local in [*(copy.local for copy in record.copies), *record.zeros]:
        boxes.setdefault(local.name, []).append(local)
    for name, shape in record.shapes.items():
        found = sorted(boxes.get(name, []), key=lambda box: box.offsets)
        if twice := _shared(found):
            raise CannotRecordError(f"{twice} is filled twice")
        filled = sum(_volume(box.shape) for box in found)
        if filled == _volume(shape):
            continue
        rows = max((box.offsets[0] + box.shape[0] for box in found), default=0)
        if name not in padded or filled != rows * _volume(shape[1:]):
            raise UnfilledError(f"{filled} of the {_volume(shape)} elements of {name} {list(shape)} are filled")


def _volume(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _shared(boxes: Sequence[TensorSlice]) -> TensorSlice | None:
    """A box that overlaps an earlier one; `boxes` are sorted by their offsets."""
    for i, box in enumerate(boxes):
        for other in boxes[i + 1 :]:
            if other.offsets[0] >= box.offsets[0] + box.shape[0]:
                break  # and so does every later one
            if _overlap(box, other):
                return other
    return None


def _overlap(box: TensorSlice, other: TensorSlice) -> bool:
    pairs = zip(box.offsets, box.shape, other.offsets, other.shape, strict=True)
    return all(a < d + m and d < a + n for a, n, d, m in pairs)

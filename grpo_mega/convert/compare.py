"""Comparison of two checkpoints of any format and layout, tensor by tensor, by Hugging Face names.

Slices of both are streamed, so memory does not grow with the model. Block-scaled FP8 weights are compared as their
bfloat16 values. Asserted by tests/e2e/test_convert_tools.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from grpo_mega.formats.byte_ranges import Shape
from grpo_mega.formats.planned_files import rows_at_once
from grpo_mega.formats.safetensors_reader import HfFiles
from grpo_mega.formats.stored_head import HEAD, checkpoint_spec
from grpo_mega.formats.torch_dist_as_hf import DistAsHf, find_base
from grpo_mega.formats.torch_dist_reader import checkpoint_folder
from grpo_mega.types import TensorSlice, UserError

Verdict = Literal["equal", "value", "dtype", "shape", "only in A", "only in B"]


class HfTensors(Protocol):
    """A checkpoint as Hugging Face tensors."""

    shapes: dict[str, Shape]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `read_into` reads without conversion."""
        ...

    def read_into(self, box: TensorSlice, out: Tensor) -> None:
        """Fill `out` with a slice."""
        ...


@dataclass(frozen=True)
class TensorComparison:
    """The result for one tensor.

    `equal` means bit for bit. `max_abs_difference` is None if the shapes differ.
    """

    name: str
    verdict: Verdict
    shapes: tuple[Shape | None, Shape | None]
    dtypes: tuple[str | None, str | None]
    max_abs_difference: float | None


def open_checkpoint(folder: Path, base: Path | None, other: Path) -> HfTensors:
    """Open a Hugging Face folder, a torch_dist checkpoint or a checkpoint of a run.

    Args:
        folder: the checkpoint.
        base: folder of the model's config.json, for a torch_dist checkpoint without one.
        other: the other checkpoint; its config.json is used if no other was found.

    Raises:
        UserError: the folder is not a checkpoint, or it is damaged.
    """
    dist = checkpoint_folder(folder)
    if dist is None:
        return _hf_tensors(folder)
    if base is None:
        try:
            base = find_base(folder, dist)
        except UserError:
            if not (other / "config.json").is_file():
                raise
            base = other
    return DistAsHf(dist, base)


def _hf_tensors(folder: Path) -> HfFiles:
    """Open a Hugging Face folder without a head that is a copy of the embedding; the embedding is compared."""
    files = HfFiles(folder, "folder")
    if HEAD in files.shapes and (folder / "config.json").is_file() and checkpoint_spec(folder).tie_embeddings:
        files.shapes.pop(HEAD)
    return files


def compare(a: HfTensors, b: HfTensors) -> Iterator[TensorComparison]:
    """Yield the result for every tensor of either checkpoint, in the order of `a`."""
    for name in [*a.shapes, *(n for n in b.shapes if n not in a.shapes)]:
        shapes = a.shapes.get(name), b.shapes.get(name)
        dtypes = _dtype_text(a, name), _dtype_text(b, name)
        if shapes[0] is None or shapes[1] is None:
            verdict: Verdict = "only in B" if shapes[0] is None else "only in A"
            yield TensorComparison(name, verdict, shapes, dtypes, None)
        elif shapes[0] != shapes[1]:
            yield TensorComparison(name, "shape", shapes, dtypes, None)
        else:
            same_bits, largest = _difference(a, b, name, shapes[0])
            verdict = "dtype" if dtypes[0] != dtypes[1] else "equal" if same_bits else "value"
            yield TensorComparison(name, verdict, shapes, dtypes, largest)


def _difference(a: HfTensors, b: HfTensors, name: str, shape: Shape) -> tuple[bool, float]:
    same, largest = True, 0.0
    step = rows_at_once(shape, torch.float64)
    for row in range(0, shape[0], step):
        part = (min(step, shape[0] - row), *shape[1:])
        box = TensorSlice(name, (row, *(0,) * (len(shape) - 1)), part)
        left, right = torch.empty(part, dtype=a.dtype(name)), torch.empty(part, dtype=b.dtype(name))
        a.read_into(box, left)
        b.read_into(box, right)
        if left.dtype == right.dtype and torch.equal(_bits(left), _bits(right)):
            continue
        same = False
        gap = (left.double() - right.double()).abs()
        # a NaN on one side only counts as an infinite difference
        gap = torch.where(left.isnan() & right.isnan(), 0.0, gap.nan_to_num(nan=float("inf"), posinf=float("inf")))
        largest = max(largest, float(gap.max()))
    return same, largest


def _bits(values: Tensor) -> Tensor:
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])


def _dtype_text(side: HfTensors, name: str) -> str | None:
    return str(side.dtype(name)).removeprefix("torch.") if name in side.shapes else None

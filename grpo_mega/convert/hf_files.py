"""The tensors of a Hugging Face folder of safetensors files, read by byte ranges.

Every header is checked when the folder is opened: sizes against shapes and against the file's length, the index
against the files. Afterwards only the bytes of the slices that are asked for are read (`bytes_read` counts them).
Safe to use from several threads. Asserted by tests/unit/test_hf_files.py.
"""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_mega.convert import fp8
from grpo_mega.convert.ranges import Shape, ShortFileError, read_box
from grpo_mega.types import TensorSlice, UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_COMPUTED = ".rotary_emb.inv_freq"  # old Llama checkpoints hold what everybody computes from config.json
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ELEMENTS_AT_ONCE = 1 << 22  # of an FP8 weight
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `position` is the byte in the file at which its data starts."""

    path: Path
    dtype: torch.dtype
    shape: Shape
    position: int


class HfFiles:
    """The tensors of a folder by name. FP8 weights with block scales read as bfloat16."""

    def __init__(self, folder: Path, key: str = "model.path", expected: dict[str, Shape] | None = None) -> None:
        """`key` is what the user set to `folder`, `expected` the shapes that config.json says: both for messages.

        Raises:
            UserError: no safetensors there, a file is missing, truncated or damaged, or the index says other than they.
        """
        self.folder, self._key = folder, key
        self.stored = _open_folder(folder, key, expected or {})
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        self.scale_names = frozenset(n for n in self.stored if n.endswith(fp8.SCALE) and _scaled(n) in self.stored)
        self.shapes = {name: tensor.shape for name, tensor in self.stored.items() if name not in self.scale_names}
        self._scales: dict[str, Tensor] = {}
        for name in self.scale_names:
            self._check_scale(name)

    def close(self) -> None:
        """Afterwards nothing can be read."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def dtype(self, name: str) -> torch.dtype:
        """Of the values that `read` gives: bfloat16 for a block-scaled FP8 weight."""
        return torch.bfloat16 if name + fp8.SCALE_SUFFIX in self.scale_names else self.stored[name].dtype

    def check(self, shapes: dict[str, Shape], aside: dict[str, Shape] | None = None) -> None:
        """Every tensor is there with its shape, holds floating-point numbers, and none is left over.

        Those of `aside`, a tied head, the scales of FP8 weights and rotary frequencies may be beside them.
        """
        aside = aside or {}
        missing = sorted(shapes.keys() - self.stored.keys())
        known = shapes.keys() | aside.keys() | {"lm_head.weight"} | self.scale_names
        extra = sorted(n for n in self.stored.keys() - known if not n.endswith(_COMPUTED))
        if missing or extra:
            told = [f"{n} of shape {shapes[n]} missing" for n in missing[:3]]
            told += [f"{n} of shape {self.stored[n].shape} unknown" for n in extra[:3]]
            more = len(missing) + len(extra) - len(told)
            raise UserError(
                f"{self._key}: tensors {', '.join(told)}{f' and {more} more' if more else ''};"
                " is config.json of this model?"
            )
        present = {name: shape for name, shape in aside.items() if name in self.stored}
        for name, shape in (shapes | present).items():
            found = self.stored[name]
            if found.shape != shape:
                raise UserError(
                    f"{self._key}: {name} has shape {found.shape}, config.json says {shape}; use matching files"
                )
            if self.dtype(name) not in WEIGHT_DTYPES:
                raise UserError(
                    f"{self._key}: {name} of shape {found.shape} has dtype {found.dtype}, a weight of shape {shape} is"
                    f" float32, bfloat16, float16, or float8_e4m3fn beside a {name}{fp8.SCALE_SUFFIX}; use such files"
                )

    def read(self, box: TensorSlice) -> Tensor:
        """The slice; only its bytes are read."""
        out = torch.empty(box.shape, dtype=self.dtype(box.name))
        self.read_into(box, out)
        return out

    def read_into(self, box: TensorSlice, out: Tensor) -> None:
        """Fill `out`, of the slice's shape and any floating-point dtype."""
        stored = self.stored[box.name]
        if box.name + fp8.SCALE_SUFFIX in self.scale_names:
            rows, columns = box.shape
            step = max(1, _ELEMENTS_AT_ONCE // max(1, columns))  # in float32 a whole weight would be four times itself
            for row in range(0, rows, step):
                at = (box.offsets[0] + row, box.offsets[1])
                part = TensorSlice(box.name, at, (min(step, rows - row), columns))
                codes = torch.empty(part.shape, dtype=stored.dtype)
                self._read(stored, part, codes)
                out[row : row + step].copy_(fp8.dequantise(codes, self.scales(box.name), at))
        elif stored.dtype == out.dtype:
            self._read(stored, box, out)
        else:
            values = torch.empty(box.shape, dtype=stored.dtype)
            self._read(stored, box, values)
            out.copy_(values)

    def scales(self, name: str) -> Tensor:
        """[ceil(R / 128), ceil(C / 128)] float32 of the FP8 weight `name`; read once."""
        scale = name + fp8.SCALE_SUFFIX
        with self._lock:
            found = self._scales.get(scale)
        if found is None:
            stored = self.stored[scale]
            found = torch.empty(stored.shape, dtype=stored.dtype)
            self._read(stored, TensorSlice(scale, (0,) * len(stored.shape), stored.shape), found)
            with self._lock:
                self._scales[scale] = found
        return found

    def _read(self, stored: StoredTensor, box: TensorSlice, out: Tensor) -> None:
        try:
            count = read_box(self._descriptor(stored.path), stored.position, stored.shape, box.offsets, out)
        except ShortFileError as error:
            raise UserError(f"{stored.path}: {box.name} cannot be read ({error}); download the file again") from None
        with self._lock:
            self.bytes_read += count

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path]

    def _check_scale(self, name: str) -> None:
        scale, weight = self.stored[name], self.stored[_scaled(name)]
        expected = tuple(-(-n // fp8.BLOCK) for n in weight.shape)
        if scale.dtype != torch.float32 or weight.dtype != torch.float8_e4m3fn or scale.shape != expected:
            raise UserError(
                f"{self._key}: {name} has shape {scale.shape} and dtype {scale.dtype}, {_scaled(name)} of shape"
                f" {weight.shape} and dtype {weight.dtype} needs float32 scales of shape {expected} for float8_e4m3fn"
                f" blocks of {fp8.BLOCK} x {fp8.BLOCK}; use matching files"
            )


def _scaled(scale: str) -> str:
    return scale.removesuffix(fp8.SCALE_SUFFIX)


def _open_folder(folder: Path, key: str, expected: dict[str, Shape]) -> dict[str, StoredTensor]:
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if not single and not index:
        raise UserError(f"{key}={folder} holds no {SINGLE}; give a folder in safetensors format")
    if not index:
        return read_header(folder / SINGLE)
    placed = _weight_map(folder / INDEX)
    if single and SINGLE not in placed.values():  # others read the single file
        raise UserError(f"{key}={folder} holds {SINGLE} and {INDEX} of other files; remove the one that is outdated")
    files: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(set(placed.values())):
        if not (folder / file).is_file():
            names = [name for name, where in placed.items() if where == file]
            told = ", ".join(f"{n} of shape {expected[n]}" if n in expected else n for n in names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{folder / file}: is missing, the index places {told}{more} there; download the file again"
            )
        files[file] = read_header(folder / file)
    _check_places(folder, placed, files, expected)
    return {name: files[file][name] for name, file in placed.items()}


def _check_places(
    folder: Path, placed: dict[str, str], files: dict[str, dict[str, StoredTensor]], expected: dict[str, Shape]
) -> None:
    for name, file in placed.items():
        if name not in files[file]:
            others = [
                f"{other} holds it with shape {files[other][name].shape}" for other in files if name in files[other]
            ]
            told = ", ".join(others) or "no file of the index does"
            wanted = f"{name} of shape {expected[name]}" if name in expected else name
            raise UserError(
                f"{folder / file}: holds no {wanted}, which the index places there, {told}; use matching files"
            )
    for file, held in files.items():
        for name, stored in held.items():
            where = placed.get(name)
            if where != file:
                told = "no file" if where is None else f"{where} with shape {files[where][name].shape}"
                raise UserError(
                    f"{folder / file}: holds {name} of shape {stored.shape}, which the index places in {told}; use"
                    " matching files"
                )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
        placed = {str(name): str(file) for name, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or JSON of something else
        raise UserError(f"{index}: is no index of safetensors files ({error!r}); download the file again") from None
    for name, file in placed.items():
        if Path(file).name != file:
            raise UserError(f"{index}: places {name} in {file!r}, which is no file of this folder; use matching files")
    return placed


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        UserError: it is not there, truncated, or its header contradicts itself or the file's length.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            text = file.read(length)
        if len(text) < length:
            raise ValueError(f"its header of {length} bytes ends after {len(text)}")
        return _checked_header(json.loads(text), path, 8 + length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); download the file again") from None


def _checked_header(header: dict[str, Any], path: Path, data: int) -> dict[str, StoredTensor]:
    end, tensors = 0, {}
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} has dtype {entry['dtype']}, none of {', '.join(DTYPES)}")
        dtype, shape = DTYPES[entry["dtype"]], tuple(map(_size, entry["shape"]))
        begin, finish = map(_size, entry["data_offsets"])
        size = math.prod(shape) * dtype.itemsize
        if begin != end or finish - begin != size:
            raise ValueError(f"{name} of shape {shape}, {dtype}, has bytes {begin}:{finish}, {end}:{end + size} is due")
        tensors[name] = StoredTensor(path, dtype, shape, data + begin)
        end = finish
    _check_length(path, tensors, data + end)
    return tensors


def _size(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no size")
    return number


def _check_length(path: Path, tensors: dict[str, StoredTensor], expected: int) -> None:
    found = path.stat().st_size
    told = ""
    for name, stored in tensors.items():
        row = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        if stored.position + math.prod(stored.shape) * stored.dtype.itemsize > found:
            whole = max(0, found - stored.position) // max(1, row)
            told = f"; of {name} of shape {stored.shape} there is {(whole, *stored.shape[1:])}"
            break
    if found != expected:
        raise ValueError(f"the file has {found} bytes, its header says {expected}{told}")

"""Headers and index of a Hugging Face folder of safetensors files, checked against each other; no weight is read.

Sizes are checked against shapes and file lengths, and the index against the files. This module parses the header
itself, because the `safetensors` library does not return the byte position of a tensor in its file. Slice reads into a
reused buffer, and messages about truncated files, need that position (docs/decisions/layout.md).
Asserted by tests/unit/formats/test_safetensors_reader.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_mega.formats.byte_ranges import Shape
from grpo_mega.types import UserError

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
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor: its data starts at byte `position` of the file."""

    path: Path
    dtype: torch.dtype
    shape: Shape
    position: int


def open_folder(folder: Path, key: str, expected: dict[str, Shape]) -> dict[str, StoredTensor]:
    """Return the tensors of all files.

    Args:
        folder: a Hugging Face folder.
        key: the name of the user's setting that holds `folder`, for messages.
        expected: the shapes of config.json, for messages.

    Raises:
        UserError: there are no safetensors files, one is missing, truncated or damaged, or the index contradicts them.
    """
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if not single and not index:
        raise UserError(f"{key}={folder} has no {SINGLE}", remedy="use a folder in safetensors format")
    if not index:
        return read_header(folder / SINGLE)
    placed = _weight_map(folder / INDEX)
    if single and SINGLE not in placed.values():  # other programs read the single file
        raise UserError(
            f"{key}={folder} holds {SINGLE} and {INDEX} of other files", remedy="remove the one that is outdated"
        )
    files: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(set(placed.values())):
        if not (folder / file).is_file():
            names = [name for name, where in placed.items() if where == file]
            listed = ", ".join(f"{n} of shape {expected[n]}" if n in expected else n for n in names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{folder / file}: was not found; the index places {listed}{more} there",
                remedy="download the file again",
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
            listed = ", ".join(others) or "no file of the index holds it"
            wanted = f"{name} of shape {expected[name]}" if name in expected else name
            raise UserError(
                f"{folder / file}: holds no {wanted}, which the index places there, {listed}",
                remedy="use matching files",
            )
    for file, held in files.items():
        for name, stored in held.items():
            where = placed.get(name)
            if where != file:
                listed = "no file" if where is None else f"{where} with shape {files[where][name].shape}"
                raise UserError(
                    f"{folder / file}: holds {name} of shape {stored.shape}, which the index places in {listed}",
                    remedy="use matching files",
                )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
        placed = {str(name): str(file) for name, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or JSON of something else
        raise UserError(
            f"{index}: is not an index of safetensors files ({error!r})", remedy="download the file again"
        ) from None
    for name, file in placed.items():
        if Path(file).name != file:
            raise UserError(
                f"{index}: places {name} in {file!r}, which is not a file of this folder", remedy="use matching files"
            )
    return placed


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file.

    Raises:
        UserError: it is missing or truncated, or its header contradicts itself or the file length.
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
        raise UserError(f"{path}: cannot be read ({error})", remedy="download the file again") from None


def _checked_header(header: dict[str, Any], path: Path, data: int) -> dict[str, StoredTensor]:
    end, tensors = 0, {}
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} has dtype {entry['dtype']}, not one of {', '.join(DTYPES)}")
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
        raise ValueError(f"{number!r} is not a size")
    return number


def _check_length(path: Path, tensors: dict[str, StoredTensor], expected: int) -> None:
    found = path.stat().st_size
    listed = ""
    for name, stored in tensors.items():
        row = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        if stored.position + math.prod(stored.shape) * stored.dtype.itemsize > found:
            whole = max(0, found - stored.position) // max(1, row)
            listed = f"; of {name} of shape {stored.shape} there is {(whole, *stored.shape[1:])}"
            break
    if found != expected:
        raise ValueError(f"the file has {found} bytes, its header says {expected}{listed}")

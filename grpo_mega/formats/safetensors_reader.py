"""Reader of a Hugging Face folder of safetensors files, by byte ranges.

Only the bytes of the requested slices are read (`bytes_read` counts them). Several threads can use one reader.
Asserted by tests/unit/formats/test_safetensors_reader.py.
"""

from __future__ import annotations

import itertools
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grpo_mega.formats.byte_ranges import Shape, ShortFileError, read_slice
from grpo_mega.formats.safetensors_headers import StoredTensor, open_folder
from grpo_mega.quantization import block_fp8, mxfp4
from grpo_mega.types import TensorSlice, UserError

_COMPUTED = ".rotary_emb.inv_freq"  # old Llama checkpoints hold it; it is computed from config.json
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ELEMENTS_AT_ONCE = 1 << 22  # elements of a quantized weight that are dequantized at a time


@dataclass(frozen=True)
class _Packed:
    """The two stored tensors of an MXFP4 weight."""

    blocks: StoredTensor
    scales: StoredTensor


class HfFiles:
    """The tensors of a folder by name; FP8 weights with block scales and MXFP4 weights are read as bfloat16."""

    def __init__(self, folder: Path, key: str = "model.path", expected: dict[str, Shape] | None = None) -> None:
        """Read the headers of all files.

        Args:
            folder: a Hugging Face folder.
            key: the name of the user's setting that holds `folder`, for messages.
            expected: the shapes of config.json, for messages.

        Raises:
            UserError: there are no safetensors files, one is missing, truncated or damaged, or the index contradicts
                them.
        """
        self.folder, self._key = folder, key
        self.stored = open_folder(folder, key, expected or {})
        self._packed = _extract_packed(self.stored, key)
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        self.scale_names = frozenset(
            n for n in self.stored if n.endswith(block_fp8.SCALE) and _scaled(n) in self.stored
        )
        self.shapes = {name: tensor.shape for name, tensor in self.stored.items() if name not in self.scale_names}
        self._scales: dict[str, Tensor] = {}
        for name in self.scale_names:
            self._check_scale(name)

    def close(self) -> None:
        """Close all files; nothing can be read afterwards."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the values that `read` returns: bfloat16 for a quantized weight."""
        return torch.bfloat16 if name + block_fp8.SCALE_SUFFIX in self.scale_names else self.stored[name].dtype

    def check(self, shapes: dict[str, Shape], aside: dict[str, Shape] | None = None) -> None:
        """Check that the folder has every tensor of `shapes` in floating point, and no unknown tensor.

        Tensors of `aside`, a tied head, the scales of FP8 weights and rotary frequencies are allowed too.

        Raises:
            UserError: a tensor is missing, unknown, or has another shape or dtype.
        """
        aside = aside or {}
        missing = sorted(shapes.keys() - self.stored.keys())
        known = shapes.keys() | aside.keys() | {"lm_head.weight"} | self.scale_names
        extra = sorted(n for n in self.stored.keys() - known if not n.endswith(_COMPUTED))
        if missing or extra:
            listed = [f"{n} of shape {shapes[n]} missing" for n in missing[:3]]
            listed += [f"{n} of shape {self.stored[n].shape} unknown" for n in extra[:3]]
            more = len(missing) + len(extra) - len(listed)
            raise UserError(
                f"{self._key}: tensors {', '.join(listed)}{f' and {more} more' if more else ''}",
                remedy="check that config.json belongs to this model",
            )
        present = {name: shape for name, shape in aside.items() if name in self.stored}
        for name, shape in (shapes | present).items():
            found = self.stored[name]
            if found.shape != shape:
                raise UserError(
                    f"{self._key}: {name} has shape {found.shape}, config.json says {shape}",
                    remedy="use matching files",
                )
            if self.dtype(name) not in WEIGHT_DTYPES:
                raise UserError(
                    f"{self._key}: {name} of shape {found.shape} has dtype {found.dtype}, a weight of shape {shape} is"
                    f" float32, bfloat16, float16, or float8_e4m3fn beside a {name}{block_fp8.SCALE_SUFFIX}",
                    remedy="use such files",
                )

    def read(self, box: TensorSlice) -> Tensor:
        """Return a slice; only its bytes are read."""
        out = torch.empty(box.shape, dtype=self.dtype(box.name))
        self.read_into(box, out)
        return out

    def read_into(self, box: TensorSlice, out: Tensor) -> None:
        """Fill `out` with a slice; `out` has its shape and any floating-point dtype."""
        stored = self.stored[box.name]
        if box.name in self._packed:
            self._read_packed(self._packed[box.name], box, out)
        elif box.name + block_fp8.SCALE_SUFFIX in self.scale_names:
            rows, columns = box.shape
            step = max(1, _ELEMENTS_AT_ONCE // max(1, columns))  # a whole weight in float32 takes four times its bytes
            for row in range(0, rows, step):
                at = (box.offsets[0] + row, box.offsets[1])
                part = TensorSlice(box.name, at, (min(step, rows - row), columns))
                codes = torch.empty(part.shape, dtype=stored.dtype)
                self._read(stored, part, codes)
                out[row : row + step].copy_(block_fp8.dequantize(codes, self.scales(box.name), at))
        elif stored.dtype == out.dtype:
            self._read(stored, box, out)
        else:
            values = torch.empty(box.shape, dtype=stored.dtype)
            self._read(stored, box, values)
            out.copy_(values)

    def _read_packed(self, packed: _Packed, box: TensorSlice, out: Tensor) -> None:
        """Read some columns of one expert at a time, because a whole weight in float32 takes eight times its bytes."""
        experts, length, columns = box.shape
        first, groups = mxfp4.groups_of(box.offsets[1], length)
        begin = box.offsets[1] - first * mxfp4.BLOCK
        step = max(1, _ELEMENTS_AT_ONCE // max(1, length))
        for expert, column in itertools.product(range(experts), range(0, columns, step)):
            count = min(step, columns - column)
            at, shape = (box.offsets[0] + expert, box.offsets[2] + column, first), (1, count, groups)
            blocks = torch.empty((*shape, packed.blocks.shape[3]), dtype=torch.uint8)
            scales = torch.empty(shape, dtype=torch.uint8)
            self._read(packed.blocks, TensorSlice(box.name, (*at, 0), tuple(blocks.shape)), blocks)
            self._read(packed.scales, TensorSlice(box.name, at, shape), scales)
            out[expert, :, column : column + count].copy_(mxfp4.dequantize(blocks, scales)[0, begin : begin + length])

    def scales(self, name: str) -> Tensor:
        """Return the scales of the FP8 weight `name`, [ceil(R / 128), ceil(C / 128)] float32; they are read once."""
        scale = name + block_fp8.SCALE_SUFFIX
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
            count = read_slice(self._descriptor(stored.path), stored.position, stored.shape, box.offsets, out)
        except ShortFileError as error:
            raise UserError(
                f"{stored.path}: {box.name} cannot be read ({error})", remedy="download the file again"
            ) from None
        with self._lock:
            self.bytes_read += count

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path]

    def _check_scale(self, name: str) -> None:
        scale, weight = self.stored[name], self.stored[_scaled(name)]
        expected = tuple(-(-n // block_fp8.BLOCK) for n in weight.shape)
        if scale.dtype != torch.float32 or weight.dtype != torch.float8_e4m3fn or scale.shape != expected:
            raise UserError(
                f"{self._key}: {name} has shape {scale.shape} and dtype {scale.dtype}, {_scaled(name)} of shape"
                f" {weight.shape} and dtype {weight.dtype} needs float32 scales of shape {expected} for float8_e4m3fn"
                f" blocks of {block_fp8.BLOCK} x {block_fp8.BLOCK}",
                remedy="use matching files",
            )


def _extract_packed(stored: dict[str, StoredTensor], key: str) -> dict[str, _Packed]:
    """Replace the stored tensors of each MXFP4 weight in `stored` by the weight, and return them by its name."""
    packed = {}
    for name in sorted(n.removesuffix(mxfp4.BLOCKS_SUFFIX) for n in stored if n.endswith(mxfp4.BLOCKS_SUFFIX)):
        blocks, scales = stored.pop(name + mxfp4.BLOCKS_SUFFIX), stored.pop(name + mxfp4.SCALES_SUFFIX, None)
        description = f"{key}: {name}{mxfp4.BLOCKS_SUFFIX} of shape {blocks.shape} and dtype {blocks.dtype}"
        if scales is None or name in stored:
            problem = f"has no {name}{mxfp4.SCALES_SUFFIX}" if scales is None else f"is stored together with {name}"
            raise UserError(
                f"{description} {problem}", remedy="an MXFP4 weight is blocks and scales, use matching files"
            )
        shape = mxfp4.shape_of(blocks.shape, scales.shape)
        if shape is None or {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise UserError(
                f"{description} and {name}{mxfp4.SCALES_SUFFIX} of shape {scales.shape} and dtype {scales.dtype} must"
                " be uint8 [E, N, K / 32, 16] and [E, N, K / 32]",
                remedy="use matching files",
            )
        packed[name] = _Packed(blocks, scales)
        stored[name] = StoredTensor(blocks.path, torch.bfloat16, shape, blocks.position)
    return packed


def _scaled(scale: str) -> str:
    return scale.removesuffix(block_fp8.SCALE_SUFFIX)

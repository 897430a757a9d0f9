"""Conversion of a Megatron `torch_dist` checkpoint of any layout to a Hugging Face folder, slice by slice.

The checkpoint can come from tools/hf_to_megatron.py, from a training run or from Megatron-LM. No model is built.
Asserted by tests/e2e/test_convert_tools.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_mega.convert.hf_to_megatron import SCALES_FILE, ConversionReport, stored_dtype
from grpo_mega.convert.resumable_output import Workspace, check_space
from grpo_mega.convert.streaming_copy import Conversion, copy_side_files, identity_of
from grpo_mega.formats.byte_ranges import Shape, read_slice
from grpo_mega.formats.planned_files import Chunk, PlannedFile, SliceCopy, rows_at_once
from grpo_mega.formats.safetensors_headers import DTYPES as STORED_DTYPES
from grpo_mega.formats.safetensors_headers import INDEX, SINGLE, StoredTensor, read_header
from grpo_mega.formats.safetensors_reader import HfFiles
from grpo_mega.formats.stored_head import HEAD, untie_config
from grpo_mega.formats.torch_dist_as_hf import DistAsHf, find_base
from grpo_mega.formats.torch_dist_reader import checkpoint_folder
from grpo_mega.models.config_fields import with_dtype
from grpo_mega.models.digest import digest_text
from grpo_mega.quantization import block_fp8
from grpo_mega.quantization.fp8_checkpoint import FP8_SCHEME
from grpo_mega.types import TensorSlice, UserError

SHARD_BYTES = 5 * 1000**3
_DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
_LINEAR_WEIGHT = re.compile(r"\.layers\..*\.((?!eh_)\w+_proj(_with_mqa)?|w[123])\.weight$")


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    base: Path | None = None,
    dtype: str = "keep",
    to_fp8: bool = False,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 2,
) -> ConversionReport:
    """Convert a checkpoint to the folder `out`, which appears only when it is complete.

    Args:
        checkpoint: the checkpoint.
        out: the new folder.
        base: folder of the model's config.json and tokenizer; the default is the folder that the checkpoint names.
        dtype: keep, bf16, fp16 or fp32.
        to_fp8: write linear layers as float8_e4m3fn with block scales; scales of `base` are kept where they fit.
        shard_bytes: largest file; a tensor is never split.
        workers: number of threads.

    Raises:
        UserError: the checkpoint is damaged or of another model, `out` is not empty, or the disk is full.
    """
    folder = checkpoint_folder(checkpoint)
    if folder is None:
        raise UserError(
            f"CKPT_DIR={checkpoint} has no .metadata and no latest_checkpointed_iteration.txt",
            remedy="use a checkpoint folder",
        )
    base = base or find_base(checkpoint, folder)
    with Workspace(out, {"CKPT_DIR": checkpoint}) as workspace, closing(DistAsHf(folder, base)) as source:
        codec = _Fp8Codec(base) if to_fp8 else None
        dtypes = {
            name: block_fp8.FP8_DTYPE
            if codec is not None and codec.is_quantized(name, shape)
            else stored_dtype(name, dtype) or source.dtype(name)
            for name, shape in source.shapes.items()
        }
        files, index = plan_safetensors(source.shapes, dtypes, shard_bytes)
        largest = max(source.shapes.items(), key=lambda item: torch.Size(item[1]).numel())
        total = sum(f.num_bytes for f in files)
        check_space(workspace.out, total - workspace.num_bytes(), f"{largest[0]} of shape {largest[1]}")
        conversion = Conversion(files, source, workspace, workers, codec)
        found = conversion.run(identity_of(folder, dtype, to_fp8, shard_bytes, identity_of(base)))
        digests = {name: digest_text(value) for name, value in sorted(found.items())}
        copy_side_files(base, workspace.result)
        _rewrite_config(workspace.result / "config.json", main_dtype(source.shapes, dtypes), to_fp8)
        if HEAD in source.shapes:
            untie_config(workspace.result / "config.json")
        if index is not None:
            (workspace.result / INDEX).write_text(json.dumps(index, indent=2))
        (workspace.result / "digests.json").write_text(json.dumps(digests, indent=1))
        workspace.publish()
    return ConversionReport(len(digests), total, len(files), tuple(conversion.redone), digests)


def plan_safetensors(
    shapes: dict[str, Shape], dtypes: dict[str, torch.dtype], shard_bytes: int
) -> tuple[list[PlannedFile], dict[str, Any] | None]:
    """Return the files, and the index if there are several."""
    groups: list[list[tuple[str, torch.dtype, Shape]]] = [[]]
    filled = total = 0
    for name, shape in shapes.items():
        parts = _stored_parts(name, dtypes[name], shape)
        size = sum(torch.Size(s).numel() * d.itemsize for _, d, s in parts)
        if filled and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1] += parts
        filled, total = filled + size, total + size
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    files = [_plan_file(name, group) for name, group in zip(names, groups, strict=True)]
    if count == 1:
        return files, None
    placed = {part[0]: name for name, group in zip(names, groups, strict=True) for part in group}
    return files, {"metadata": {"total_size": total}, "weight_map": placed}


def _stored_parts(name: str, dtype: torch.dtype, shape: Shape) -> list[tuple[str, torch.dtype, Shape]]:
    parts = [(name, dtype, shape)]
    if dtype == block_fp8.FP8_DTYPE:
        parts.append((name + block_fp8.SCALE_SUFFIX, torch.float32, tuple(-(-n // block_fp8.BLOCK) for n in shape)))
    return parts


def _plan_file(file: str, group: list[tuple[str, torch.dtype, Shape]]) -> PlannedFile:
    # wide dtypes first, so that every tensor starts at a multiple of its item size
    ordered = sorted(group, key=lambda part: -part[1].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in ordered:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    chunks: list[Chunk] = []
    for name, dtype, shape in group:
        if not name.endswith(block_fp8.SCALE):
            scale = header.get(name + block_fp8.SCALE_SUFFIX) if dtype == block_fp8.FP8_DTYPE else None
            scales_at = None if scale is None else data + scale["data_offsets"][0]
            chunks += _chunks_of(name, dtype, shape, data + header[name]["data_offsets"][0], scales_at)
    return PlannedFile(file, data + end, tuple(chunks), ((0, len(text).to_bytes(8, "little") + text),))


def _chunks_of(name: str, dtype: torch.dtype, shape: Shape, position: int, scales_at: int | None) -> list[Chunk]:
    multiple = 1 if scales_at is None else block_fp8.BLOCK
    # quantization works in float32 and needs several copies
    step = rows_at_once(shape, dtype if scales_at is None else torch.float64, multiple)
    row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
    chunks = []
    for row in range(0, shape[0], step):
        part = (min(step, shape[0] - row), *shape[1:])
        box = TensorSlice(name, (row, *(0,) * (len(shape) - 1)), part)
        scale = None if scales_at is None else scales_at + row // block_fp8.BLOCK * -(-shape[1] // block_fp8.BLOCK) * 4
        chunks.append(Chunk(position + row * row_bytes, part, dtype, (SliceCopy(box, (0,) * len(shape)),), scale))
    return chunks


class _Fp8Codec:
    """FP8 values of chunks, with the scales of the checkpoint `base` where they reproduce the values."""

    def __init__(self, base: Path) -> None:
        """Read the scales of `base`; if it has none, every block is scaled by its largest value.

        Raises:
            UserError: its config requires scales that are not supported.
        """
        self._stored: dict[str, StoredTensor] = {}
        found = json.loads((base / "config.json").read_text()).get("quantization_config") or FP8_SCHEME
        if found.get("quant_method") != "fp8":
            raise UserError(
                f"--fp8: {base / 'config.json'} has quant_method={found.get('quant_method')}",
                remedy="leave --fp8 out to write bfloat16; only quant_method=fp8 is supported",
            )
        if found.get("scale_fmt", "float") != "float":
            raise UserError(
                f"--fp8: {base / 'config.json'} has scale_fmt={found['scale_fmt']}",
                remedy="use a base with float32 scales; no others are supported",
            )
        self._unconverted = tuple(found.get("modules_to_not_convert") or ())
        if (base / SCALES_FILE).is_file():
            self._stored = read_header(base / SCALES_FILE)
        elif (base / INDEX).is_file() or (base / SINGLE).is_file():
            with closing(HfFiles(base, "--base")) as files:
                self._stored = {name: files.stored[name] for name in files.scale_names}

    def is_quantized(self, name: str, shape: Shape) -> bool:
        """Return True for the weights that have scales in `base`.

        If `base` has no scales, return True for all linear layers outside its modules_to_not_convert.
        """
        if self._stored:
            return name + block_fp8.SCALE_SUFFIX in self._stored
        module = name.removesuffix(".weight")
        left_out = any(module == each or module.startswith(f"{each}.") for each in self._unconverted)
        return len(shape) == 2 and _LINEAR_WEIGHT.search(name) is not None and not left_out

    def encode(self, chunk: Chunk, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantized values and scales of rows that start at a multiple of the block."""
        box = chunk.pieces[0].source
        stored = self._stored.get(box.name + block_fp8.SCALE_SUFFIX)
        scales = None
        if stored is not None:
            scales = torch.empty(self.scales_shape(chunk.shape))
            with stored.path.open("rb") as file:
                at = (box.offsets[0] // block_fp8.BLOCK, 0)
                read_slice(file.fileno(), stored.position, stored.shape, at, scales)
        try:
            return block_fp8.quantize(values, scales)
        except UserError as error:
            raise UserError(f"{box}: {error}") from None

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the values [r, c] bfloat16."""
        return block_fp8.dequantize(codes, scales)

    def scales_shape(self, shape: Shape) -> Shape:
        """Return the shape of the scales, one for each block."""
        return tuple(-(-n // block_fp8.BLOCK) for n in shape)


def main_dtype(shapes: dict[str, Shape], dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """Return the dtype that most elements have, without those that are quantized."""
    elements: Counter[torch.dtype] = Counter()
    for name, shape in shapes.items():
        elements[dtypes[name]] += torch.Size(shape).numel()
    del elements[block_fp8.FP8_DTYPE]
    return elements.most_common(1)[0][0]


def _rewrite_config(path: Path, dtype: torch.dtype, to_fp8: bool) -> None:
    raw = json.loads(path.read_text())
    wanted = with_dtype(raw, str(dtype).removeprefix("torch."))
    if to_fp8:
        wanted.setdefault("quantization_config", FP8_SCHEME)
    else:
        wanted.pop("quantization_config", None)
    if wanted != raw:
        path.write_text(json.dumps(wanted, indent=2))

"""Conversion of a Hugging Face folder to a Megatron `torch_dist` checkpoint, without a GPU or a process group.

Megatron loads `OUT_DIR/release/` in any layout; `OUT_DIR/latest_checkpointed_iteration.txt` names it. `OUT_DIR/hf/`
keeps config, tokenizer and the block scales of an FP8 checkpoint for the conversion back.
Asserted by tests/e2e/test_convert_tools.py: a stock GPTModel loads it and gives the logits of transformers.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from grpo_mega.convert.resumable_output import Workspace, check_space
from grpo_mega.convert.streaming_copy import Conversion, copy_side_files, identity_of
from grpo_mega.formats.megatron_args import megatron_args
from grpo_mega.formats.megatron_keys import MegatronTensor, extra_state_keys, megatron_tensors
from grpo_mega.formats.safetensors_reader import HfFiles
from grpo_mega.formats.stored_head import checkpoint_spec, untie_config
from grpo_mega.formats.torch_dist_as_hf import HF_SIDE
from grpo_mega.formats.torch_dist_reader import LATEST
from grpo_mega.formats.torch_dist_writer import DistPlan
from grpo_mega.models.digest import digest_text
from grpo_mega.models.parameter_tables import hf_shapes, hf_shapes_aside, keeps_float32
from grpo_mega.types import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RELEASE, SCALES_FILE = "release", "fp8_scales.safetensors"
FILE_BYTES = 1024**3


@dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion. `redone` are the files that this call wrote; the others were already complete."""

    num_tensors: int
    num_bytes: int
    num_files: int
    redone: tuple[str, ...]
    digests: dict[str, str]


def hf_to_megatron(
    hf: Path, out: Path, *, dtype: str = "keep", file_bytes: int = FILE_BYTES, workers: int = 2
) -> ConversionReport:
    """Convert `hf` to the folder `out`, which appears only when it is complete.

    Args:
        hf: a Hugging Face folder.
        out: the new folder.
        dtype: keep, bf16, fp16 or fp32; FP8 weights become bf16.
        file_bytes: a new file begins after this size.
        workers: number of threads.

    Raises:
        UserError: `hf` is damaged or not supported, `out` is not empty, or the disk is full.
    """
    spec = checkpoint_spec(hf)
    with Workspace(out, {"HF_DIR": hf}) as workspace, closing(HfFiles(hf, "HF_DIR", hf_shapes(spec))) as source:
        source.check(hf_shapes(spec), hf_shapes_aside(spec))
        tensors = [tensor for tensor in megatron_tensors(spec) if _is_complete(tensor, source)]
        dtypes = [stored_dtype(t.placements[0].hf.name, dtype) or _common_dtype(t, source) for t in tensors]
        plan = DistPlan(RELEASE, file_bytes)
        plan.add_object(extra_state_keys(spec, tensors), [None])
        for tensor, chosen in zip(tensors, dtypes, strict=True):
            plan.add(tensor, chosen)
        files = plan.finish()
        largest = max(source.stored.items(), key=lambda item: torch.Size(item[1].shape).numel())
        total = sum(f.num_bytes for f in files)
        check_space(workspace.out, total - workspace.num_bytes(), f"{largest[0]} of shape {largest[1].shape}")
        conversion = Conversion(files, source, workspace, workers)
        found = conversion.run(identity_of(hf, dtype, file_bytes))
        digests = {name: digest_text(value) for name, value in sorted(found.items())}
        plan.write_metadata(workspace.result / RELEASE, megatron_args(spec, dtypes[0]), conversion.plan_digest())
        _write_side(hf, source, workspace.result)
        if not spec.tie_embeddings:
            untie_config(workspace.result / HF_SIDE / "config.json")
        (workspace.result / "digests.json").write_text(json.dumps(digests, indent=1))
        workspace.publish()
    return ConversionReport(len(digests), total, len(files), tuple(conversion.redone), digests)


def _write_side(hf: Path, source: HfFiles, result: Path) -> None:
    (result / LATEST).write_text(RELEASE)
    (result / HF_SIDE).mkdir(exist_ok=True)
    copy_side_files(hf, result / HF_SIDE)
    if source.scale_names:
        scales = {n: source.scales(n.removesuffix("_scale_inv")) for n in sorted(source.scale_names)}
        save_file(scales, result / HF_SIDE / SCALES_FILE)


def stored_dtype(hf_name: str, wanted: str) -> torch.dtype | None:
    """Return the dtype of a tensor under --dtype=`wanted`; None means unchanged."""
    return None if keeps_float32(hf_name) else DTYPES.get(wanted)


def _is_complete(tensor: MegatronTensor, source: HfFiles) -> bool:
    names = sorted({p.hf.name for p in tensor.placements})
    missing = [name for name in names if name not in source.stored]
    if missing and len(missing) < len(names):
        present = next(name for name in names if name not in missing)
        shape = {p.hf.name: p.hf.shape for p in tensor.placements}[missing[0]]
        raise UserError(
            f"HF_DIR: {missing[0]} of shape {shape} is missing, but {present} of shape {source.shapes[present]} exists",
            remedy="they belong together: add it, or remove the whole multi-token-prediction layer",
        )
    return not missing


def _common_dtype(tensor: MegatronTensor, source: HfFiles) -> torch.dtype:
    found = {p.hf.name: source.dtype(p.hf.name) for p in tensor.placements}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} of shape {source.stored[name].shape} {d}" for name, d in sorted(found.items()))
        raise UserError(f"HF_DIR: {listed} become one tensor and differ in dtype", remedy="choose a dtype with --dtype")
    return next(iter(found.values()))

"""Part `digests` of tools/gpu_proof.py: speed of weight digests on the device, and their equality with the CPU's."""

from __future__ import annotations

import torch

from grpo_mega.models.digest import slice_digest
from grpo_mega.types import TensorSlice
from tools.gpu_checks.part_job import PartJob

# rows x columns: a matrix of a layer, an embedding, a norm, an odd number of columns, and a stack of experts
SHAPES = {"cuda": ((8192, 8192), (128256, 4096), (8192,), (4097, 2815), (16, 2048, 1536)),
          "cpu": ((64, 64), (501, 32), (64,), (33, 27), (4, 16, 24))}  # fmt: skip


def main(job: PartJob) -> None:
    """Compare digests with the CPU's, then measure them."""
    generator = torch.Generator().manual_seed(0)
    wrong, blind, num_bytes, tensors = [], [], 0, []
    for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn):
        for shape in SHAPES[job.device.type]:
            values = torch.randn(shape, generator=generator).to(dtype)
            hf = TensorSlice("weight", (0,) * len(shape), shape)
            on_device = values.to(job.device)
            digest = slice_digest(on_device, hf)
            if digest != slice_digest(values, hf):
                wrong.append(f"{dtype} {shape}")
            on_device.view(torch.uint8).flatten()[-1] ^= 1
            if slice_digest(on_device, hf) == digest:
                blind.append(f"{dtype} {shape}")
            if dtype == torch.bfloat16:
                tensors.append((on_device, hf))
                num_bytes += on_device.nbytes
    job.result.check(
        "digests that differ from the CPU's", wrong, [], passed=not wrong,
        reason="sums modulo 2^64 are exact in every order",
    )  # fmt: skip
    job.result.check(
        "changed bits that a digest missed", blind, [], passed=not blind,
        reason="the factors are odd, so a single bit always changes the sum",
    )  # fmt: skip
    seconds = job.seconds_of(lambda: [slice_digest(values, hf) for values, hf in tensors])
    speed = num_bytes / seconds / 1e9
    job.result.add(bytes=num_bytes, seconds=seconds, gb_per_second=speed)
    job.result.put(main=f"{speed:.3g} GB/s of bf16 weights")

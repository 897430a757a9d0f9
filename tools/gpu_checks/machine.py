"""Part `machine` of tools/gpu_proof.py: the imports of all other parts, and the device's own speed."""

from __future__ import annotations

import importlib
import time

import torch

from tools.gpu_checks.part_job import PartJob

# What the other parts import. A missing package, or an interface that another release of torch lacks, shows here first.
MODULES = (
    "transformers",
    "grpo_mega.config.load",
    "grpo_mega.planner.plan",
    "grpo_mega.policy.policy",
    "grpo_mega.policy.inspect.module_sizes",
    "grpo_mega.trainer.batch",
    "grpo_mega.trainer.phases",
    "grpo_mega.weight_sync.transports.factory",
    "tools.gpu_checks.digest_speed",
    "tools.gpu_checks.memory_phases",
    "tools.gpu_checks.packed_rows",
    "tools.gpu_checks.peer_transport",
    "tools.gpu_checks.policy",
    "tools.gpu_checks.reference_swap",
    "tools.gpu_checks.saved_state",
)


def main(job: PartJob) -> None:
    """Import every module, then measure a matrix product and a copy."""
    seconds: dict[str, float] = {}
    for module in MODULES:
        begin = time.perf_counter()
        importlib.import_module(module)
        seconds[module] = round(time.perf_counter() - begin, 3)
        job.result.add(import_seconds=seconds)
    size = 8192 if job.on_gpu else 64
    left, right = (torch.randn(size, size, device=job.device, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * size**3 / job.seconds_of(lambda: left @ right)
    source = torch.empty(2**32 if job.on_gpu else 2**16, dtype=torch.uint8, device=job.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / job.seconds_of(lambda: target.copy_(source))
    job.result.add(matrix_tflops=flops / 1e12, copy_gb_per_second=copied / 1e9)
    device = job.result.content["conditions"]["device"]
    job.result.put(main=f"{device}, torch {torch.__version__}: bf16 {flops / 1e12:.3g} TFLOP/s")

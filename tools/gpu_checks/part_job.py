"""One part of tools/gpu_proof.py while it runs: its device, its clock, its memory and its result.

A part measures on the device of its `PartJob`. Without CUDA a job can only be a rehearsal, and its result says so: no
number of a CPU is taken for a GPU's.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch

from grpo_mega.planner.hardware import GPUS
from grpo_mega.types import UserError
from tools.gpu_checks.result_file import ResultFile

WARM_UP, REPEATS = 3, 7
_PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "vllm", "sglang", "transformers",
             "nvidia-nccl-cu13")  # fmt: skip


@dataclass(frozen=True)
class PartJob:
    """One part that runs: its name, the size of its model, the GPU as the planner names it, its result and device."""

    part: str
    size: str
    gpu: str
    result: ResultFile
    device: torch.device

    @classmethod
    def start(cls, part: str, size: str, gpu: str, result: ResultFile, *, rehearsal: bool) -> PartJob:
        """Return the job of a command line, and write its conditions into the result.

        Raises:
            RuntimeError: there is no GPU and this is no rehearsal, or a rehearsal sees a GPU.
            UserError: `gpu` is `auto`, and the planner does not know this GPU.
        """
        if rehearsal and torch.cuda.is_available():
            raise RuntimeError("a rehearsal runs without a GPU; tools/gpu_proof.py hides it with CUDA_VISIBLE_DEVICES")
        if not rehearsal:
            require_cuda()
        device = torch.device("cpu") if rehearsal else torch.device("cuda", 0)
        if gpu == "auto":
            gpu = "cpu" if rehearsal else planner_name(torch.cuda.get_device_name())
        result.put(size=size, conditions=conditions(device) | {"planner_gpu": gpu})
        return cls(part, size, gpu, result, device)

    @property
    def on_gpu(self) -> bool:
        """False in a rehearsal."""
        return self.device.type == "cuda"

    def seconds_of(self, action: Callable[[], object]) -> float:
        """Return the median seconds of REPEATS synchronized calls, after WARM_UP calls; a rehearsal makes one call."""
        warm_up, repeats = (WARM_UP, REPEATS) if self.on_gpu else (0, 1)
        times = []
        for i in range(warm_up + repeats):
            self.synchronize()
            begin = time.perf_counter()
            action()
            self.synchronize()
            if i >= warm_up:
                times.append(time.perf_counter() - begin)
        return median(times)

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def memory(self) -> dict[str, int]:
        """Return bytes in use: `used` by all users of the device, `allocated` and `peak` by PyTorch; 0 in a rehearsal.

        `used` includes the CUDA context, NCCL and other processes.
        """
        if not self.on_gpu:
            return {"used": 0, "allocated": 0, "peak": 0, "peak_reserved": 0}
        free, total = torch.cuda.mem_get_info()
        return {
            "used": total - free,
            "allocated": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
        }

    def release_cached(self) -> None:
        """Give unused memory of PyTorch's allocator back to the device, and reset its peak."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def check_memory(self, name: str, found: float, limit: float, *, reason: str) -> None:
        """Add a check of device memory; a rehearsal has none, so there it is recorded as not made."""
        passed = found <= limit if self.on_gpu else None
        self.result.check(name, found, limit, passed=passed, reason=reason)


def planner_name(device_name: str) -> str:
    """Return the planner's name of a GPU, from the name that its driver reports.

    Raises:
        UserError: the planner does not know this GPU.
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    for name in GPUS:
        if name.partition("-")[0].upper() in words:
            return name
    raise UserError(
        f"--gpu: the planner has no device for {device_name!r}", remedy=f"name one: --gpu with one of {', '.join(GPUS)}"
    )


def require_cuda() -> None:
    """Raise RuntimeError if there is no GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: tools/gpu_proof.py measures on GPUs only")


def conditions(device: torch.device) -> dict[str, Any]:
    """Return the conditions of every measurement: machine, versions, command, date."""
    found: dict[str, Any] = {
        "device": "cpu, rehearsal: says nothing about a GPU",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

"""The GPUs of this machine and the links between them, asked through NVML (nvidia-ml-py); starts no CUDA context."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from grpo_mega.config.fp8_rules import check_engine_generation, check_generation
from grpo_mega.doctor.finding import Finding, passed
from grpo_mega.parallel.devices import num_driver_gpus

GIB = 2**30
_USED_BY_OTHERS = 1 * GIB
_MOST_LINKS = 18
_UNKNOWN_CUDA = (99, 0)  # a torch that says nothing is believed


@dataclass(frozen=True)
class Device:
    """Bytes in all and in use; `links`: NVLinks that are up, None where the device has none."""

    name: str
    total: int
    used: int
    links: int | None


def check_gpus(num_ranks: int, nvml: Any | None = None, *, one_each: bool = False) -> list[Finding]:
    """Enough, alike, empty and linked.

    Args:
        num_ranks: of the job on this machine.
        nvml: the module pynvml.
        one_each: Slurm may show every task its own device alone, so that fewer than ranks are no fault.
    """
    if nvml is None:
        if num_driver_gpus() == 0:
            return [passed("GPUs", "none here: ranks compute on the CPU and talk over gloo")]
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return [
                Finding("GPUs", "warn", "cannot be asked: pynvml is not installed", "pip install nvidia-ml-py"),
            ]
    nvml.nvmlInit()
    try:
        devices = [_device(nvml, i) for i in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()
    return [_number(devices, 1 if one_each else num_ranks), _kinds(devices), _empty(devices), _links(devices)]


def check_recipe(recipe: str, torch_version: str, nvml: Any | None = None) -> Finding:
    """Do the GPUs, and the CUDA that torch is built for, have this FP8 recipe?"""
    found = _capability(nvml)
    if isinstance(found, Finding):
        return found
    built = re.search(r"\+cu(\d+)(\d)$", torch_version)
    cuda = (int(built[1]), int(built[2])) if built else _UNKNOWN_CUDA
    return _fp8_finding(check_generation(recipe, found, cuda), f"{recipe} on compute capability {found[0]}.{found[1]}")


def check_engine_fp8(nvml: Any | None = None) -> Finding:
    """Do the GPUs compute with the FP8 codes of an engine?"""
    found = _capability(nvml)
    if isinstance(found, Finding):
        return found
    return _fp8_finding(check_engine_generation(found), f"engine on compute capability {found[0]}.{found[1]}")


def _fp8_finding(problem: str, fine: str) -> Finding:
    if problem:
        message, _, remedy = problem.rpartition("; ")
        return Finding("FP8", "fail", message, remedy)
    return passed("FP8", f"{fine}; unproven")


def _capability(nvml: Any | None) -> tuple[int, int] | Finding:
    """Of the first GPU; or why it cannot be asked."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return Finding("FP8", "warn", "the GPUs cannot be asked: no pynvml", "pip install nvidia-ml-py")
    nvml.nvmlInit()
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(nvml.nvmlDeviceGetHandleByIndex(0))
    finally:
        nvml.nvmlShutdown()
    return major, minor


def _device(nvml: Any, index: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name = nvml.nvmlDeviceGetName(handle)
    return Device(
        name.decode() if isinstance(name, bytes) else name, memory.total, memory.used, _num_links(nvml, handle)
    )


def _num_links(nvml: Any, handle: Any) -> int | None:
    active = None
    for link in range(_MOST_LINKS):
        try:
            up = nvml.nvmlDeviceGetNvLinkState(handle, link)
        except nvml.NVMLError:  # the device has no such link
            break
        active = (active or 0) + int(up == 1)
    return active


def _number(devices: list[Device], num_ranks: int) -> Finding:
    if len(devices) >= num_ranks:
        return passed("GPUs", f"{len(devices)} x {devices[0].name} for {num_ranks} rank(s)" if devices else "0")
    return Finding(
        "GPUs", "fail", f"{len(devices)} for {num_ranks} rank(s) on this machine",
        f"set run.world_size so that {len(devices)} ranks a node suffice, or use more nodes",
    )  # fmt: skip


def _kinds(devices: list[Device]) -> Finding:
    kinds = sorted({device.name for device in devices})
    if len(kinds) <= 1:
        return passed("GPU kinds", "all alike")
    return Finding(
        "GPU kinds", "warn", f"{', '.join(kinds)}: the slowest sets the pace, the smallest the memory",
        "choose devices of one kind with CUDA_VISIBLE_DEVICES",
    )  # fmt: skip


def _empty(devices: list[Device]) -> Finding:
    taken = [f"GPU {i}: {d.used / GIB:.1f} GiB" for i, d in enumerate(devices) if d.used > _USED_BY_OTHERS]
    if not taken:
        return passed("GPU memory", "no other program holds any")
    return Finding("GPU memory", "warn", f"in use by others: {', '.join(taken)}", "end those programs (nvidia-smi)")


def _links(devices: list[Device]) -> Finding:
    if len(devices) < 2:
        return passed("NVLink", "one device, no links")
    links = [device.links for device in devices]
    if all(n is None for n in links):
        return Finding(
            "NVLink",
            "warn",
            "these devices have none: tensor parallelism goes over PCIe",
            "keep parallel.tp and engine.tp small",
        )
    if len(set(links)) > 1 or not links[0]:
        return Finding(
            "NVLink", "warn", f"links that are up differ between the devices: {links}",
            "reset the devices or their switches (nvidia-smi nvlink --status; systemctl status nvidia-fabricmanager)",
        )  # fmt: skip
    return passed("NVLink", f"{links[0]} links up on each device")

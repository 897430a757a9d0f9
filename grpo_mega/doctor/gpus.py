"""Checks of this machine's GPUs and their links through NVML (nvidia-ml-py); no CUDA context is created."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_mega.config.fp8_rules import check_engine_generation, check_generation
from grpo_mega.config.schema import Config
from grpo_mega.doctor.finding import Finding, passed, tried
from grpo_mega.models.engine_memory import check_memory_share
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.devices import num_driver_gpus
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError

GIB = 2**30
_USED_BY_OTHERS = 1 * GIB
_MOST_LINKS = 18
_UNKNOWN_CUDA = (99, 0)  # newer than every requirement: a torch that does not name its CUDA version passes


@dataclass(frozen=True)
class Device:
    """One GPU: total and used bytes, and the number of active NVLinks (None: the device has no NVLink)."""

    name: str
    uuid: str
    total: int
    used: int
    links: int | None


def check_gpus(num_ranks: int, nvml: Any | None = None, *, one_each: bool = False) -> list[Finding]:
    """Check that there are enough GPUs, of one kind, not in use, and linked.

    Args:
        num_ranks: ranks of the job on this machine.
        nvml: the module pynvml; None imports it.
        one_each: True under Slurm, which may show each task only its own GPU: then one GPU is enough.
    """
    if nvml is None and num_driver_gpus() == 0:
        return [passed("GPUs", "none on this machine: ranks compute on the CPU and communicate over gloo")]
    devices = _devices(nvml)
    if isinstance(devices, Finding):
        return [devices]
    return [_number(devices, 1 if one_each else num_ranks), _kinds(devices), _empty(devices), _links(devices)]


def check_engine_share(
    config: Config, spec: ModelSpec, topology: Topology, env: Mapping[str, str], nvml: Any | None = None
) -> Finding:
    """Check that `engine.memory_share` of the smallest GPU holds the engine, and that the fullest GPU has it free.

    Args:
        config: the run.
        spec: its model.
        topology: its ranks.
        env: environment variables; CUDA_VISIBLE_DEVICES says which GPUs of the machine are meant.
        nvml: the module pynvml; None imports it.
    """
    name = "engine memory"
    found = _devices(nvml)
    if isinstance(found, Finding):
        return Finding(name, found.status, found.message, found.remedy)
    used = visible_devices(found, env)
    total, free = min(d.total for d in used), min(d.total - d.used for d in used)

    def check() -> str:
        share = check_memory_share(config, spec, topology, total)
        if share.limit > free:
            raise UserError(
                f"engine.memory_share={config.engine.memory_share:g} is {share.limit / GIB:.1f} GiB, and "
                f"{free / GIB:.1f} of {total / GIB:.1f} GiB of a GPU are free",
                remedy=f"stop other programs (nvidia-smi), or use at most engine.memory_share="
                f"{math.floor(100 * free / total) / 100:g}",
            )
        return f"{share.kv_cache / GIB:.1f} of {total / GIB:.1f} GiB of a GPU are left for the KV cache"

    return tried(name, check)


def visible_devices(devices: Sequence[Device], env: Mapping[str, str]) -> list[Device]:
    """Return the devices that CUDA_VISIBLE_DEVICES names; all, if it is unset or names something else than devices."""
    chosen = []
    for name in filter(None, (part.strip() for part in env.get("CUDA_VISIBLE_DEVICES", "").split(","))):
        named = [d for i, d in enumerate(devices) if name == str(i) or d.uuid.startswith(name)]
        if len(named) != 1:  # for example a part of a GPU (MIG)
            return list(devices)
        chosen += named
    return chosen or list(devices)


def check_recipe(recipe: str, torch_cuda: tuple[int, int] | None, nvml: Any | None = None) -> Finding:
    """Check that the GPUs, and the CUDA version that torch is built for, support this FP8 recipe."""
    found = _capability(nvml)
    if isinstance(found, Finding):
        return found
    cuda = _UNKNOWN_CUDA if torch_cuda is None else torch_cuda
    return _fp8_finding(check_generation(recipe, found, cuda), f"{recipe} on compute capability {found[0]}.{found[1]}")


def compute_capability(nvml: Any | None = None) -> tuple[int, int] | None:
    """Return the compute capability of the first GPU; None if NVML is not installed."""
    found = _capability(nvml)
    return None if isinstance(found, Finding) else found


def check_engine_fp8(nvml: Any | None = None) -> Finding:
    """Check that the GPUs support an engine in FP8."""
    found = _capability(nvml)
    if isinstance(found, Finding):
        return found
    return _fp8_finding(check_engine_generation(found), f"engine on compute capability {found[0]}.{found[1]}")


def _fp8_finding(problem: UserError | None, supported: str) -> Finding:
    if problem is not None:
        return Finding("FP8", "fail", problem.message, problem.remedy)
    return passed("FP8", f"{supported}; not verified on a GPU")


def _capability(nvml: Any | None) -> tuple[int, int] | Finding:
    """Return the compute capability of the first GPU, or a finding that says why it cannot be read."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return Finding(
                "FP8", "warn", "the GPUs cannot be checked: pynvml is not installed", "pip install nvidia-ml-py"
            )
    nvml.nvmlInit()
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(nvml.nvmlDeviceGetHandleByIndex(0))
    finally:
        nvml.nvmlShutdown()
    return major, minor


def _devices(nvml: Any | None) -> list[Device] | Finding:
    """Return the GPUs of this machine, or a finding that says why they cannot be read."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return Finding("GPUs", "warn", "cannot be checked: pynvml is not installed", "pip install nvidia-ml-py")
    nvml.nvmlInit()
    try:
        return [_device(nvml, i) for i in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _device(nvml: Any, index: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name, uuid = (
        text.decode() if isinstance(text, bytes) else text
        for text in (nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle))
    )
    return Device(name, uuid, memory.total, memory.used, _num_links(nvml, handle))


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
        "GPUs", "fail", f"{len(devices)} GPU(s) for {num_ranks} rank(s) on this machine",
        f"set run.world_size to {len(devices)} ranks per node, or use more nodes",
    )  # fmt: skip


def _kinds(devices: list[Device]) -> Finding:
    kinds = sorted({device.name for device in devices})
    if len(kinds) <= 1:
        return passed("GPU kinds", "all GPUs are of one kind")
    return Finding(
        "GPU kinds", "warn", f"{', '.join(kinds)}: the slowest GPU limits the speed, the smallest limits the memory",
        "choose devices of one kind with CUDA_VISIBLE_DEVICES",
    )  # fmt: skip


def _empty(devices: list[Device]) -> Finding:
    taken = [f"GPU {i}: {d.used / GIB:.1f} GiB" for i, d in enumerate(devices) if d.used > _USED_BY_OTHERS]
    if not taken:
        return passed("GPU memory", "not in use by other programs")
    return Finding(
        "GPU memory", "warn", f"in use by other programs: {', '.join(taken)}", "stop those programs (nvidia-smi)"
    )


def _links(devices: list[Device]) -> Finding:
    if len(devices) < 2:
        return passed("NVLink", "one GPU needs no links")
    links = [device.links for device in devices]
    if all(n is None for n in links):
        return Finding(
            "NVLink",
            "warn",
            "these GPUs have no NVLink: tensor parallelism uses PCIe",
            "keep parallel.tp and engine.tp small",
        )
    if len(set(links)) > 1 or not links[0]:
        return Finding(
            "NVLink", "warn", f"the number of active links differs between the GPUs: {links}",
            "reset the GPUs or their switches (nvidia-smi nvlink --status; systemctl status nvidia-fabricmanager)",
        )  # fmt: skip
    return passed("NVLink", f"{links[0]} active links on each GPU")

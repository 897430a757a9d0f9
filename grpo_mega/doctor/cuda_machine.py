"""Checks of what CUDA needs from a machine: libraries, driver, allocator, kernel queues.

`read_facts` reads the machine and decides nothing; every check is a function of facts, so that tests can give it the
facts of machines that they do not run on. Paths in messages are those of the packages whose behavior is the reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mega.doctor import gpus
from grpo_mega.doctor.finding import Finding, passed
from grpo_mega.parallel.device_queues import VARIABLE, queue_conflict, required_queues
from grpo_mega.parallel.topology import Topology

_OLDEST_GLIBC = (2, 34)  # llguidance (vLLM) and sglang have no wheels for an older one
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch reads the first that is set
# Where Transformer Engine looks for cuDNN before Python's packages, in its order (common/__init__.py:390).
_CUDNN_VARIABLES = ("CUDNN_HOME", "CUDNN_PATH", "CUDA_HOME", "CUDA_PATH")
_TOOLKIT = Path("/usr/local/cuda")

Version = tuple[int, int]


@dataclass(frozen=True)
class CudaFacts:
    """Facts about a machine with CUDA; None: not there, or it cannot be read."""

    glibc: Version | None
    driver_cuda: Version | None
    """Newest CUDA version that the NVIDIA driver supports."""
    torch_cuda: Version | None
    """CUDA version that torch is built for."""
    capability: Version | None
    """Compute capability of the first GPU."""
    system_cudnn: str | None
    """The cuDNN outside of Python's packages that Transformer Engine would load."""
    wheel_cudnn: Path | None
    """Folder of the cuDNN that torch brings as a package."""
    flashinfer: str | None
    precompiled_kernels: str | None
    """Version of flashinfer-cubin."""
    can_compile: bool
    """nvcc and ninja are installed."""


def read_facts(env: Mapping[str, str], nvml: Any | None = None) -> CudaFacts:
    """Read the facts of this machine; creates no CUDA context and does not import torch."""
    wheel = _wheel_cudnn()
    return CudaFacts(
        glibc=_numbers(os.confstr("CS_GNU_LIBC_VERSION") or ""),
        driver_cuda=_driver_cuda(nvml),
        torch_cuda=torch_cuda(),
        capability=gpus.compute_capability(nvml),
        system_cudnn=find_system_cudnn(env, _TOOLKIT, _loader_cache()),
        wheel_cudnn=wheel,
        flashinfer=_version("flashinfer-python"),
        precompiled_kernels=_version("flashinfer-cubin"),
        can_compile=_has_compiler(env),
    )


def check_cuda(
    facts: CudaFacts, env: Mapping[str, str], topology: Topology | None, engine_kind: str, transport: str
) -> list[Finding]:
    """Run all checks of this module.

    Args:
        facts: of the machine.
        env: environment variables.
        topology: the layout of the job; None: the rules that depend on it are left out.
        engine_kind: `engine.kind`.
        transport: `weight_sync.transport`.
    """
    found = [check_glibc(facts.glibc), check_driver(facts.driver_cuda, facts.torch_cuda)]
    found += [check_cudnn(facts.system_cudnn, facts.wheel_cudnn), check_allocator(env, engine_kind, transport)]
    if facts.flashinfer is not None:
        found.append(check_kernels(facts.flashinfer, facts.precompiled_kernels, can_compile=facts.can_compile))
    if topology is not None:
        found.append(check_queues(topology, env, facts.capability))
    return found


def check_glibc(glibc: Version | None) -> Finding:
    """Check that the C library is new enough for the wheels of the CUDA environments."""
    if glibc is None:
        return Finding(
            "glibc", "warn", "the C library is not glibc: the packages of constraints/ have wheels for glibc only",
            "use an image with glibc, for example one of docker/",
        )  # fmt: skip
    name, oldest = ".".join(map(str, glibc)), ".".join(map(str, _OLDEST_GLIBC))
    if glibc >= _OLDEST_GLIBC:
        return passed("glibc", name)
    return Finding(
        "glibc", "fail", f"{name}: llguidance (vLLM) and sglang have wheels for glibc {oldest} and later only",
        "use an image of docker/, or a system of 2022 or later (Ubuntu 22.04, Debian 12, RHEL 9)",
    )  # fmt: skip


def check_driver(driver: Version | None, torch: Version | None) -> Finding:
    """Check that the driver supports the CUDA version of torch. Minor versions of one major version are compatible."""
    if torch is None:
        remedy = "build the environment with launch/setup.sh on a machine where nvidia-smi finds a GPU"
        return Finding("driver", "fail", "this machine has GPUs, and torch is built without CUDA", remedy)
    if driver is None:
        return Finding("driver", "warn", "cannot be checked: pynvml is not installed", "pip install nvidia-ml-py")
    ours, built = (".".join(map(str, each)) for each in (driver, torch))
    if driver[0] >= torch[0]:
        return passed("driver", f"supports CUDA {ours}, torch is built for {built}")
    return Finding(
        "driver", "fail", f"the driver supports CUDA {ours}, and torch is built for {built}: CUDA will not initialize",
        f"install a driver for CUDA {torch[0]} (NVIDIA's release notes of CUDA {torch[0]} name the oldest), or on data "
        f"center GPUs the package cuda-compat-{torch[0]}-{torch[1]}",
    )  # fmt: skip


def check_cudnn(system: str | None, wheel: Path | None) -> Finding:
    """Check that torch and Transformer Engine load the same cuDNN.

    torch loads the one that it brings as a package. Transformer Engine loads the system's if there is one.
    """
    if system is None or wheel is None or Path(system).is_relative_to(wheel):
        return passed("cuDNN", f"{wheel or system or 'none'} is the only one")
    return Finding(
        "cuDNN", "warn", f"two: Transformer Engine loads {system}, torch loads {wheel}; their parts may not fit",
        f"remove the system's cuDNN (use a base image without it), or set CUDNN_PATH={wheel}",
    )  # fmt: skip


def check_allocator(env: Mapping[str, str], engine_kind: str, transport: str) -> Finding:
    """Check that torch's `expandable_segments` does not meet an engine or a transport that cannot use them.

    vLLM 0.32 switches them off around the memory that it puts to sleep (device_allocator/cumem.py:387).
    """
    name = next((each for each in _ALLOCATOR_VARIABLES if env.get(each)), None)
    options = dict(part.partition(":")[::2] for part in env.get(name or "", "").replace(" ", "").split(","))
    if options.get("expandable_segments", "").lower() not in ("true", "1"):
        return passed("allocator", "no expandable_segments")
    setting = f"{name}={env[str(name)]}"
    reason = ""
    if engine_kind == "sglang":
        reason = "engine.kind=sglang: torch_memory_saver, which puts SGLang to sleep, does not support them"
    elif transport == "cuda_ipc":
        reason = "weight_sync.transport=cuda_ipc: other processes cannot map them without permission to ptrace"
    if not reason:
        return passed("allocator", f"{setting}; vLLM switches them off around memory that sleeps")
    return Finding("allocator", "fail", f"{setting}: {reason}", f"remove expandable_segments from {name}")


def check_kernels(flashinfer: str, precompiled: str | None, *, can_compile: bool) -> Finding:
    """Check that FlashInfer has kernels of its own release, or can compile them."""
    if precompiled is not None and precompiled == flashinfer:
        return passed("FlashInfer kernels", f"flashinfer-cubin {precompiled}")
    remedy = "FLASHINFER_DISABLE_VERSION_CHECK=1 python -m flashinfer download-kernels (launch/setup.sh --with kernels)"
    if precompiled is not None:
        return Finding(
            "FlashInfer kernels", "fail",
            f"flashinfer-cubin {precompiled} with flashinfer-python {flashinfer}: FlashInfer cannot be imported",
            remedy,
        )  # fmt: skip
    message = "none are precompiled: every rank compiles them at its first start, which takes minutes"
    if not can_compile:
        message = "none are precompiled, and nvcc or ninja is missing: vLLM computes without FlashInfer"
    return Finding("FlashInfer kernels", "warn", message, remedy)


def check_queues(topology: Topology, env: Mapping[str, str], capability: Version | None) -> Finding:
    """Check CUDA_DEVICE_MAX_CONNECTIONS against the layout (parallel/device_queues.py)."""
    conflict = queue_conflict(topology, env, capability)
    if conflict is not None:
        return Finding("CUDA queues", "warn", conflict, f"unset {VARIABLE}: the program sets it")
    required = required_queues(topology, capability)
    if VARIABLE in env:
        return passed("CUDA queues", f"{VARIABLE}={env[VARIABLE]}")
    return passed("CUDA queues", f"the program sets {VARIABLE}={required}" if required else "CUDA's default")


def find_system_cudnn(env: Mapping[str, str], toolkit: Path, loader_cache: str) -> str | None:
    """Return the cuDNN that Transformer Engine finds before Python's packages; None if it finds none.

    Args:
        env: environment variables.
        toolkit: the default folder of the CUDA toolkit.
        loader_cache: output of `ldconfig -p`.
    """
    folders = [Path(env[key]) for key in _CUDNN_VARIABLES if env.get(key)]
    for folder in (*folders, toolkit):
        if found := sorted(folder.glob("**/libcudnn.so*"), key=lambda file: file.name, reverse=True):
            return str(found[0])
    # Then the dynamic loader is asked for the name without a version, which only development packages install.
    for folder_name in filter(None, env.get("LD_LIBRARY_PATH", "").split(":")):
        if (Path(folder_name) / "libcudnn.so").exists():
            return str(Path(folder_name) / "libcudnn.so")
    cached = re.search(r"^\s*libcudnn\.so \(.*=> (\S+)$", loader_cache, re.MULTILINE)
    return cached[1] if cached else None


def torch_cuda() -> Version | None:
    """Return the CUDA version that the installed torch is built for, from its file version.py; None: without CUDA."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    built = re.search(r"^cuda\b.*=\s*'([\d.]+)'", text, re.MULTILINE)
    return _numbers(built[1]) if built else None


def _driver_cuda(nvml: Any | None) -> Version | None:
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None
    nvml.nvmlInit()
    try:
        number = int(nvml.nvmlSystemGetCudaDriverVersion_v2())  # 13020 is 13.2
    finally:
        nvml.nvmlShutdown()
    return number // 1000, number % 1000 // 10


def _wheel_cudnn() -> Path | None:
    nvidia = importlib.util.find_spec("nvidia")  # a namespace of NVIDIA's packages
    for folder in [] if nvidia is None else list(nvidia.submodule_search_locations or ()):
        for part in ("cudnn", "cu13"):
            if any((Path(folder) / part / "lib").glob("libcudnn.so*")):
                return Path(folder) / part
    return None


def _loader_cache() -> str:
    ldconfig = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if ldconfig is None:
        return ""
    return subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=False).stdout


def _has_compiler(env: Mapping[str, str]) -> bool:
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    nvcc = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")
    return (nvcc or shutil.which(str(_TOOLKIT / "bin" / "nvcc"))) is not None and shutil.which("ninja") is not None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(text: str) -> Version | None:
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None

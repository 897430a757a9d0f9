"""GPUs of this machine as the NVIDIA driver lists them; needs neither torch nor NVML."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

DEVICE_FILES = Path("/dev")
DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")  # exists where the NVIDIA driver is loaded


def has_cuda_driver() -> bool:
    """Return whether the NVIDIA driver is loaded on this machine."""
    return DRIVER_FOLDER.is_dir()


def num_driver_gpus() -> int:
    """Return the number of GPUs that the driver lists, 0 without a driver."""
    return len(list(DRIVER_FOLDER.iterdir())) if DRIVER_FOLDER.is_dir() else 0


def num_visible_gpus(env: Mapping[str, str]) -> int:
    """Return the number of GPUs left by CUDA_VISIBLE_DEVICES, which Slurm and users set."""
    found, shown = num_driver_gpus(), env.get("CUDA_VISIBLE_DEVICES")
    return found if shown is None else min(found, len([name for name in shown.split(",") if name.strip()]))


def num_usable_gpus() -> int | None:
    """Return the number of GPUs whose device files this process may open; None if the machine has no such files.

    Slurm (`--gpus-per-task`) and containers hide the other GPUs of a machine from a process.
    """
    files = [file for file in DEVICE_FILES.glob("nvidia*") if file.name.removeprefix("nvidia").isdecimal()]
    return sum(map(_can_open, files)) if files else None


def _can_open(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_RDWR))
    except OSError:
        return False
    return True

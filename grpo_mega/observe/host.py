"""Metrics of the machine of rank 0: memory of its process and free space on the disk of the run folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil


class HostMetrics:
    """Reads the metrics `host/*`."""

    def __init__(self, run_folder: Path) -> None:
        """Measure the file system of `run_folder` and this process."""
        self._folder, self._process = run_folder, psutil.Process()

    def step_metrics(self) -> dict[str, float]:
        """Return the metrics at this moment."""
        disk = shutil.disk_usage(self._folder)
        return {
            "host/memory_bytes": float(self._process.memory_info().rss),
            "host/disk_free_fraction": disk.free / disk.total,
        }

"""Reads the state of a node and of a rank's process through psutil and the kernel's own files.

Asserted by tests/unit/observe/hardware/test_host.py.
"""

from __future__ import annotations

import logging
import resource
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

_PRESSURE = Path("/proc/pressure/memory")


class NodeReader:
    """Reads the host of this node.

    Args:
        pressure: the kernel's file of memory pressure (Linux 4.20 with PSI); the metric is left out without it.
    """

    def __init__(self, pressure: Path = _PRESSURE) -> None:
        self._pressure = pressure
        self._has_pressure = pressure.is_file()
        if not self._has_pressure:
            log.info("host/memory_pressure_* is left out: this kernel has no %s", pressure)
        psutil.cpu_percent()  # the first call measures nothing

    def read(self) -> dict[str, float]:
        """Return the values at this moment; `cpu_utilization` since the last call."""
        memory = psutil.virtual_memory()
        found = {
            "cpu_utilization": psutil.cpu_percent() / 100,
            "memory_available_fraction": memory.available / memory.total,
            "page_cache_bytes": float(memory.cached),
        }
        if self._has_pressure:
            found["memory_pressure"] = stalled_fraction(self._pressure.read_text())
        return found


def disk_free_fraction(folder: Path) -> float:
    """Return the free part of the file system of a folder."""
    disk = psutil.disk_usage(str(folder))
    return disk.free / disk.total


def stalled_fraction(text: str) -> float:
    """Return the fraction of the last 10 s in which a task waited for memory, from `some avg10=1.25 ...` (percent).

    The kernel counts waits for reclaim, for refaults of the page cache, and for swap.
    Source: the kernel's Documentation/accounting/psi.rst.
    """
    some = next(line for line in text.splitlines() if line.startswith("some "))
    return float(next(part for part in some.split() if part.startswith("avg10=")).removeprefix("avg10=")) / 100


class ProcessReader:
    """Reads this rank's process."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt

    def read(self) -> dict[str, float]:
        """Return resident memory, open files as a fraction of the limit, and page reads from disk since the last call.

        A page read (major fault) is a page of a file or of swap that had left the memory.
        """
        faults, before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, self._faults
        self._faults = faults
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        open_files = self._process.num_fds()
        return {
            "rank_memory_bytes": float(self._process.memory_info().rss),
            "open_files": float(open_files),
            "open_files_fraction": 0.0 if limit == resource.RLIM_INFINITY else open_files / limit,
            "page_reads": float(faults - before),
        }

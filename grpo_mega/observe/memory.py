"""Measures the peak memory of a rank in each phase of a step, on CUDA devices and on Linux hosts.

Asserted by tests/unit/observe/test_memory.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from grpo_mega.types import UserError

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PhasePeaks:
    """Peak memory by phase. The time between two phases counts to the earlier phase.

    Args:
        take_peak: returns the peak in bytes since its last call; None: nothing is measured.
    """

    def __init__(self, take_peak: Callable[[], int] | None) -> None:
        self._take_peak = take_peak
        self._current = ""
        self._peaks: dict[str, int] = {}

    def phase(self, name: str) -> None:
        """Start a phase, or resume it after a nested phase."""
        self._close()
        self._current = name

    def step_metrics(self) -> dict[str, float]:
        """Return the peaks since the last call, in bytes, under the names of the metrics."""
        self._close()
        found = {f"memory/peak_{name}_bytes": float(peak) for name, peak in self._peaks.items()}
        self._peaks = {}
        return found

    def _close(self) -> None:
        if self._take_peak is None:
            return
        peak = self._take_peak()
        if self._current:
            self._peaks[self._current] = max(peak, self._peaks.get(self._current, 0))


def device_peak(device: str) -> Callable[[], int]:
    """Return `take_peak` of `PhasePeaks`: peak of the torch allocator on a CUDA device, of this process elsewhere.

    Raises:
        UserError: this system cannot measure the peak of a process.
    """
    if device == "cuda":
        return _cuda_peak
    try:
        _process_peak()
    except (OSError, AttributeError) as error:
        raise UserError(
            f"observe.memory_peaks=true needs Linux with glibc, or CUDA ({error})",
            remedy="leave it out on this machine",
        ) from None
    return _process_peak


def _cuda_peak() -> int:
    import torch

    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def _process_peak() -> int:
    """Return VmHWM in bytes and reset it to the present resident size by writing 5 to clear_refs (proc(5)).

    malloc_trim first returns freed memory to the system; otherwise the resident size would never fall.
    """
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    return int(line.split()[1]) * 1024

"""The most memory that a rank held in each phase of a step. One reader for each kind of machine; the rest counts.

Asserted by tests/unit/observe/test_memory.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from grpo_mega.types import UserError

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PhasePeaks:
    """Peaks by phase. `phase` is told when one begins; what follows a phase until the next one counts to it.

    Args:
        take_peak: Bytes at the peak since its last call; None: there are no peaks.
    """

    def __init__(self, take_peak: Callable[[], int] | None) -> None:
        self._take_peak = take_peak
        self._now = ""
        self._peaks: dict[str, int] = {}

    def phase(self, name: str) -> None:
        """A phase begins, or goes on after one inside it."""
        self._close()
        self._now = name

    def step_metrics(self) -> dict[str, float]:
        """The peaks since the last call, by the names of the metrics."""
        self._close()
        found = {f"memory/peak_{name}_bytes": float(peak) for name, peak in self._peaks.items()}
        self._peaks = {}
        return found

    def _close(self) -> None:
        if self._take_peak is None:
            return
        peak = self._take_peak()
        if self._now:
            self._peaks[self._now] = max(peak, self._peaks.get(self._now, 0))


def device_peak(device: str) -> Callable[[], int]:
    """For `PhasePeaks`: of torch's allocator on a CUDA device, elsewhere of this process.

    Raises:
        UserError: this system does not tell.
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
    """VmHWM, which 5 in clear_refs sets back to what is resident now (proc(5)). Freed memory stays with the process:
    without malloc_trim that would be whatever was ever needed."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    return int(line.split()[1]) * 1024

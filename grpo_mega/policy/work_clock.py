"""Measures the forward and backward passes of this rank until their gradients are reduced over data-parallel ranks.

In this time a rank waits only for the ranks of its own model copy (tp, cp, pp), so the slowest copy has the most
seconds. Asserted by tests/parallel/test_rank_reports.py.
"""

from __future__ import annotations

import time

import torch


class WorkClock:
    """Sum of the seconds between `start` and `stop`; on CUDA between the kernels that are queued at these calls."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._started_at: float | None = None
        self._open: torch.cuda.Event | None = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Start a span. A span that has not ended, because its pass failed, is dropped."""
        if self._on_cuda:
            self._open = torch.cuda.Event(enable_timing=True)
            self._open.record()
        self._started_at = time.monotonic()

    def stop(self) -> None:
        """End the span; a second call does nothing."""
        if self._started_at is None:
            return
        if self._open is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._spans.append((self._open, end))
        else:
            self._seconds += time.monotonic() - self._started_at
        self._started_at = self._open = None

    def take(self) -> float:
        """Return the seconds since the last call. Waits for the last kernel of a span, which is long done by then."""
        for start, end in self._spans:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        found, self._seconds, self._spans = self._seconds, 0.0, []
        return found

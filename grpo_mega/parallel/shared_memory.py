"""The folder of shared memory of this machine."""

from __future__ import annotations

from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - files of this package have random names, mode 0600 and O_EXCL
"""Linux keeps files of this folder in memory (shm_overview(7))."""

"""The pure-Python distribution of Transformer Engine at the release that constraints/ pins."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def pinned_release() -> str:
    """Return the version in both constraints files of CUDA environments."""
    found = {
        match[1]
        for path in (REPOSITORY / "constraints").glob("cuda-*.txt")
        for match in re.finditer(r"^transformer-engine==(\S+)", path.read_text(), re.MULTILINE)
    }
    (version,) = found
    return version


def transformer_engine_wheel(folder: Path) -> Path:
    """Return the wheel in `folder`, downloaded once; skip the test if the package index is not reachable."""
    name = f"transformer_engine-{pinned_release()}"
    if not list(folder.glob(f"{name}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, f"--dest={folder}", f"transformer_engine=={pinned_release()}"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"the package index is not reachable: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob(f"{name}-*.whl")
    return wheel

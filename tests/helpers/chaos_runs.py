"""Runs of `grpo-mega chaos`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.jobs import REPOSITORY, clean_environment


def disturb(output: Path, *arguments: str, seconds: float) -> list[str]:
    """Run `grpo-mega chaos ARGUMENTS` and return the lines of its table."""
    env = {**clean_environment(), "PYTHONPATH": str(REPOSITORY)}
    with output.open("wb") as file:
        ended = subprocess.run(
            [sys.executable, "-m", "grpo_mega.cli.main", "chaos", *arguments],
            cwd=REPOSITORY,
            env=env,
            stdout=file,
            stderr=file,
            timeout=seconds,
            check=False,
        )
    shown = output.read_text()
    assert ended.returncode == 0, shown
    return shown.splitlines()

"""Training runs that are disturbed by signals at random moments end as the undisturbed run and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.timeout(600)
def test_a_disturbed_run_ends_as_the_undisturbed_run(tmp_path: Path) -> None:
    lines = disturb(tmp_path / "table", "--number", "1", "--seed", "3", "--only", "TP2 vLLM", seconds=550)
    assert lines[-1] == "1 of 1 ended as the undisturbed run and left nothing behind"
    assert "complete before the signal" not in "".join(lines)  # it was disturbed


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
def test_sixty_disturbed_runs_over_all_layouts_and_engines_end_as_the_undisturbed_run(tmp_path: Path) -> None:
    number = os.environ.get("CHAOS_NUMBER", "60")
    lines = disturb(tmp_path / "table", "--number", number, "--seed", "0", seconds=3 * 3600)
    assert lines[-1] == f"{number} of {number} ended as the undisturbed run and left nothing behind"

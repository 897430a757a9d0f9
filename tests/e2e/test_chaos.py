"""Training runs that are disturbed by signals at random moments end as the undisturbed run and leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.chaos_runs import disturb


@pytest.mark.timeout(600)
def test_a_disturbed_run_ends_as_the_undisturbed_run(tmp_path: Path) -> None:
    """SIGKILL of the launcher of two ranks; test_resume.py has the other signals."""
    lines = disturb(tmp_path / "table", "--number", "1", "--seed", "2", "--only", "TP2 vLLM", seconds=550)
    assert lines[-1] == "1 of 1 ended as the undisturbed run and left nothing behind"
    assert "complete before the signal" not in "".join(lines)  # it was disturbed


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
def test_sixty_disturbed_runs_over_all_layouts_and_engines_end_as_the_undisturbed_run(tmp_path: Path) -> None:
    number = os.environ.get("CHAOS_NUMBER", "60")
    lines = disturb(tmp_path / "table", "--number", number, "--seed", "0", seconds=3 * 3600)
    assert lines[-1] == f"{number} of {number} ended as the undisturbed run and left nothing behind"

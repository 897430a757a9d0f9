"""A checkout of the project in which tests/helpers/stub_train.py replaces the program of a rank.

Tests of how a job starts and ends use it: a start takes a second instead of half a minute.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tests.helpers.jobs import REPOSITORY

_SHARED = ("configs", "constraints", "pyproject.toml", "tools")


def make_checkout(folder: Path) -> Path:
    """Create the checkout in `folder` and return it."""
    (folder / "grpo_mega").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "launch", folder / "launch")
    # The stub must not rebuild the environment of this test: a failed build is started again from nothing.
    (folder / "launch" / "setup.sh").write_text("#!/usr/bin/env bash\nexit 0\n")
    for name in _SHARED:
        (folder / name).symlink_to(REPOSITORY / name)
    for entry in (REPOSITORY / "grpo_mega").iterdir():
        name = "real_train.py" if entry.name == "train.py" else entry.name
        if name != "__pycache__":
            (folder / "grpo_mega" / name).symlink_to(entry)
    shutil.copy(Path(__file__).with_name("stub_train.py"), folder / "grpo_mega" / "train.py")
    return folder


def python_environment() -> dict[str, str]:
    """Return the variable that names this test's Python environment, for a checkout without its own."""
    return {"GRPO_MEGA_VENV": sys.prefix}


def ranks_of(folder: Path) -> list[dict[str, int]]:
    """Return the records of all ranks in rank order, and delete them for the next start."""
    found = {}
    for path in folder.glob("rank_*.json"):
        account = json.loads(path.read_text())
        found[account["RANK"]] = account
        path.unlink()
    return [found[rank] for rank in sorted(found)]

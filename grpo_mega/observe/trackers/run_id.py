"""The id of a run in trackers, in a file of the run folder: all commands of a run have the same one."""

from __future__ import annotations

import secrets
from pathlib import Path

from grpo_mega.observe.atomic_files import write_atomically

_FILE = "tracker_id"


def run_id(folder: Path) -> str:
    """Return the id of the run in `folder`; make it if there is none."""
    path = folder / _FILE
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text(encoding="ascii").strip()

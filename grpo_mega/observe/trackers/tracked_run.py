"""The run that a tracker shows, with its id, which all commands of the run share, in a file of the run folder."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mega.observe.atomic_files import write_atomically

_FILE = "tracker_id"


@dataclass(frozen=True)
class TrackedRun:
    """A run in trackers."""

    folder: Path
    """The run folder, into which the library writes unless its own environment variables name a server."""
    identity: str
    """Id of the run, the same in all its commands."""
    config: Mapping[str, Any]
    """The resolved config, which the tracker shows."""

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any]) -> TrackedRun:
        """Return the run in `folder`; make its id if there is none."""
        path = folder / _FILE
        if not path.exists():
            write_atomically(path, secrets.token_hex(8))
        return cls(folder, path.read_text(encoding="ascii").strip(), config)

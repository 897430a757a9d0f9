"""Files of a checkpoint for the rollouts that a run carries from one step to the next, one per prompt shard.

Asserted by tests/unit/checkpoint/test_carried_parts.py and tests/e2e/test_partial_rollouts.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from grpo_mega.types import FileSink

CARRIED = "carried"
"""Folder in a checkpoint."""
_NAME = re.compile(r"rank_(\d{5})\.safetensors")


class SavedPart(Protocol):
    """Rollouts that one prompt shard carries; its ranks have equal objects."""

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        ...


@dataclass(frozen=True)
class CarriedParts:
    """Files of a rank.

    Attributes:
        rank: of this process; it names the file.
        is_writer: True on the first rank of each prompt shard.
        read: returns this rank's part from the files of all writers, in the order of their ranks.
    """

    rank: int
    is_writer: bool
    read: Callable[[Sequence[Path]], SavedPart]

    def write(self, folder: Path, part: SavedPart, files: FileSink | None) -> None:
        """Write the part of this rank into a checkpoint, on a rank that writes.

        Args:
            folder: the checkpoint, which has the folder CARRIED.
            part: of this rank.
            files: receives the file; None: it is written at once.

        Raises:
            OSError: it cannot be written.
        """
        if not self.is_writer:
            return
        path, content = folder / CARRIED / f"rank_{self.rank:05d}.safetensors", part.to_bytes()
        if files is None:
            path.write_bytes(content)
        else:
            files.add_file(path, [content])

    def load(self, checkpoint: Path) -> SavedPart | None:
        """Return the part of this rank; None if nothing was carried."""
        paths = sorted((checkpoint / CARRIED).glob("rank_*.safetensors"))
        return self.read(paths) if paths else None


def rank_of_part(name: str) -> int | None:
    """Return the rank that wrote a file of this name; None for other names."""
    found = _NAME.fullmatch(name)
    return None if found is None else int(found[1])

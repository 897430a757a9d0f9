"""Deletes checkpoints that are not needed any more while the run continues.

Deleting a checkpoint takes seconds on a large file system. So it is renamed, which makes it invisible at once, and a
thread deletes it. What a killed run leaves is deleted with the next old checkpoint.
Asserted by tests/unit/checkpoint/test_removal.py.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterable
from itertools import count
from pathlib import Path

_PREFIX = ".removed_"
log = logging.getLogger(__name__)


class CheckpointRemoval:
    """The thread that deletes folders of `checkpoints/`, on the rank that renames and deletes there."""

    def __init__(self) -> None:
        """Delete nothing yet."""
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        """True while the thread deletes."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, checkpoints: Path, folders: Iterable[Path]) -> None:
        """Make `folders` of `checkpoints` invisible, and delete them and what is left of earlier ones in a thread.

        Raises:
            OSError: a folder cannot be renamed.
        """
        for folder in folders:
            folder.rename(_free_name(folder))
        hidden = sorted(checkpoints.glob(f"{_PREFIX}*"))
        if hidden and not self.is_running:  # if it is running, the next call finds them
            # a daemon: a thread that waits for a file system must not keep a failed rank alive
            self._thread = threading.Thread(target=_delete, args=(hidden,), name="checkpoint-removal", daemon=True)
            self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait until the folders are deleted, at most `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)


def _free_name(folder: Path) -> Path:
    """Return a hidden name that no folder has; one may be left that could not be deleted."""
    names = (folder.with_name(f"{_PREFIX}{folder.name}{f'-{n}' if n else ''}") for n in count())
    return next(path for path in names if not path.exists() and not path.is_symlink())


def _delete(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(folder)
        except FileNotFoundError:
            pass  # another process has deleted it
        except OSError as error:
            log.warning("%s is not needed any more and cannot be deleted: %s", folder, error)

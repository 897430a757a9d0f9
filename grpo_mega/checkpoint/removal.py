"""Deletes checkpoints that are not needed any more while the run continues.

Deleting a checkpoint takes seconds on a large file system. So it is renamed, which makes it invisible at once, and a
thread deletes it. What a killed run leaves is deleted by the next save.
Asserted by tests/unit/checkpoint/test_removal.py.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

_PREFIX = ".removed_"
log = logging.getLogger(__name__)


class CheckpointRemoval:
    """The thread that deletes folders of `checkpoints/`. Only the rank that renames and deletes there has one."""

    def __init__(self) -> None:
        """Delete nothing yet."""
        self._thread: threading.Thread | None = None

    def start(self, folders: Sequence[Path]) -> None:
        """Make the folders invisible, and delete them in a thread. Waits for the deletions of the call before.

        Raises:
            OSError: a folder cannot be renamed.
        """
        self.wait()
        hidden = [folder.rename(folder.with_name(_PREFIX + folder.name)) for folder in folders]
        if hidden:
            # a daemon: a thread that waits for a file system must not keep a failed rank alive
            self._thread = threading.Thread(target=_delete, args=(hidden,), name="checkpoint-removal", daemon=True)
            self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the folders are deleted, at most `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None


def delete_left_over(checkpoints: Path) -> None:
    """Delete what a killed run has not deleted.

    Raises:
        OSError: a folder cannot be deleted.
    """
    for path in checkpoints.glob(f"{_PREFIX}*"):
        shutil.rmtree(path)


def _delete(folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            log.warning("%s is not needed any more and cannot be deleted: %s", folder, error)

"""Resumable output folder, which is renamed into place when it is complete.

`OUT.partial` holds the unfinished result, a record of each complete file, and a lock. The last step renames it to
`OUT`. After a kill the same command continues the work, and a different command discards it. A folder of that name
that is not a workspace is not changed, and two processes cannot use one workspace.
Asserted by tests/unit/convert/test_resumable_output.py and tests/e2e/test_convert_tools.py.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from grpo_mega.types import UserError

_PLAN, _LOCK, _RESULT, _RECORDS = "plan.sha256", "lock", "result", "records"
_WORKSPACE_NAMES = frozenset((_PLAN, _LOCK, _RESULT, _RECORDS))
_log = logging.getLogger(__name__)


class Workspace:
    """Context manager of one output folder: `result` becomes `out`, and the lock is released at the end."""

    def __init__(self, out: Path, inputs: Mapping[str, Path]) -> None:
        """Check the folders; nothing is written. `inputs` maps the user's names to the folders that are read.

        Raises:
            UserError: `out` is not empty or inside an input, or the workspace folder has unknown files.
        """
        self.out = Path(os.path.realpath(out))
        for key, folder in inputs.items():
            if self.out.is_relative_to(os.path.realpath(folder)):
                raise UserError(f"OUT_DIR={out} is {key}={folder} or inside it", remedy="use a folder elsewhere")
        self._check_free()
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.result, self._records = self.folder / _RESULT, self.folder / _RECORDS
        self._lock: int | None = None
        foreign = sorted({p.name for p in self.folder.iterdir()} - _WORKSPACE_NAMES) if self.folder.is_dir() else []
        if foreign or (self.folder.exists() and not self.folder.is_dir()):
            found = f" (it has {foreign[0]})" if foreign else ""
            raise UserError(f"{self.folder}: is needed as the workspace and is not one{found}", remedy="move it")

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def begin(self, identity: str) -> None:
        """Create the workspace, or continue the one that was started for the same `identity`.

        Raises:
            UserError: another process uses it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self._check_free()
        wanted = hashlib.sha256(identity.encode()).hexdigest()
        plan = self.folder / _PLAN
        if not plan.is_file() or plan.read_text() != wanted:
            for folder in (self.result, self._records):
                shutil.rmtree(folder, ignore_errors=True)
            plan.write_text(wanted)
        for folder in (self.result, self._records):
            folder.mkdir(exist_ok=True)

    def record(self, name: str) -> Path:
        """Return the path of the record of the file `name` of the result."""
        return self._records / (name.replace("/", "--") + ".json")

    def num_bytes(self) -> int:
        """Return the bytes of the result so far."""
        return sum(path.stat().st_size for path in self.result.rglob("*") if path.is_file())

    def abandon(self) -> None:
        """Clean up after an error: keep complete files, or remove the workspace if there are none."""
        for path in (*self.result.rglob("*.tmp"), *self._records.rglob("*.tmp")):
            path.unlink(missing_ok=True)
        if not any(self._records.iterdir()):
            shutil.rmtree(self.folder)

    def publish(self) -> None:
        """Rename the complete result to `out`, after all files are on disk."""
        for path in self.result.rglob("*"):
            sync_path(path)
        sync_path(self.result)
        self.result.rename(self.out)
        sync_path(self.out.parent)
        shutil.rmtree(self.folder)

    def _check_free(self) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out}: exists and is not empty", remedy="remove it or use another folder")

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.folder}: another process uses it", remedy="wait for it or use another OUT_DIR"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            _log.warning("%s: this file system has no locks; start one conversion to it at a time", self.folder)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears only when it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.rename(path)


def check_space(folder: Path, num_bytes: int, largest: str) -> None:
    """Raise UserError if the file system of `folder` has less free space than `num_bytes`."""
    existing = next(p for p in [folder, *folder.absolute().parents] if p.is_dir())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(
            f"{folder}: needs {num_bytes} bytes, its file system has {free} (largest tensor: {largest})",
            remedy="free space or use a folder elsewhere",
        )

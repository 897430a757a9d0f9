"""Lock of a run folder: one command at a time. The kernel releases it when the process ends.

Asserted by tests/unit/observe/test_run_lock.py.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_mega.types import UserError


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock `folder`, which does not have to exist.

    The lock file is beside the folder, because `run.overwrite` moves the folder.

    The lock belongs to the process and not to the open file: forked child processes do not inherit it.

    Raises:
        UserError: another process, which the message names, holds the lock; or the lock file cannot be written.
    """
    path = folder.with_name(f".{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"run.dir={folder} cannot be written: {error.strerror}", remedy="name a writable folder"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"run.dir={folder} is in use by {holder}", remedy="wait for it, end it, or name another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield

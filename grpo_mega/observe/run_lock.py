"""One command at a time in a run folder. The system drops the lock with the process that held it, however it ended."""

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
    """Hold `folder`, which need not exist yet; the lock lies beside it, since `run.overwrite` moves the folder away.

    A lock of the process, not of the open file: processes that are forked from it do not keep it alive.

    Raises:
        UserError: another process holds it (names it), or its file cannot be written.
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

"""Writes what a worker process prints to the log of its parent, line by line.

User code prints from there, for example a reward. On the terminal such a line would break the live display, and a
terminal escape in it would control the terminal; the log escapes it (observe/log.py). In a program without a log the
lines go to its stderr.
Asserted by tests/unit/workers/test_worker_output.py.
"""

from __future__ import annotations

import logging
import sys
import threading
from typing import IO

MAX_SHOWN = 20
"""Lines of a worker that the screen shows; the log file has all."""
MAX_LINE_BYTES = 10_000
log = logging.getLogger(__name__)


def log_output(pipe: IO[bytes], name: str) -> threading.Thread:
    """Log each line that arrives, until every process that holds the other end has closed it; close the pipe then.

    The thread is a daemon: a process that a worker left behind does not hold up the end of this process.

    Args:
        pipe: output of the worker, stdout and stderr. It is not read again elsewhere.
        name: precedes each line.

    Returns:
        The thread that reads.
    """
    thread = threading.Thread(target=_read, args=(pipe, name), name=f"output of {name}", daemon=True)
    thread.start()
    return thread


def _read(pipe: IO[bytes], name: str) -> None:
    num_lines = 0
    with pipe:
        while line := pipe.readline(MAX_LINE_BYTES):
            num_lines += 1
            text = line.rstrip(b"\r\n").decode("utf-8", errors="backslashreplace")
            if not log.isEnabledFor(logging.INFO):  # a tool without a log, such as `score`
                sys.stderr.write(f"{text}\n")
                continue
            log.info("%s: %s", name, text, extra={"file_only": num_lines > MAX_SHOWN})
            if num_lines == MAX_SHOWN:
                log.info("%s: more lines are in the log file only", name)

"""Ends a command without an error when the reader of its output closes the pipe, as `head` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def allow_closed_pipe() -> Iterator[None]:
    """Leave the block at the first write into a closed pipe; what is still buffered is dropped."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Kinds of failed scorings, and the text that describes one."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Literal

FailureKind = Literal[
    "timed out", "crashed", "raised an exception", "returned no number in its range", "got no answer from its server"
]
REPORTED: tuple[FailureKind, ...] = ("raised an exception", "returned no number in its range")
"""Kinds that a worker process reports itself; the parent notices the others."""

_CALLERS = frozenset(("base.py", "worker.py", "batched.py", "pool.py"))
_MAX_TRACEBACK_CHARACTERS = 4000


class BadValueError(ValueError):
    """A reward returned something that is not a number in its declared range."""


def summary_of(error: BaseException) -> str:
    """Return an exception in one line."""
    return f"{type(error).__name__}: {error}"[:500]


def traceback_of(error: BaseException) -> str:
    """Return the traceback of an exception, without the frames of the callers in this package; its end if it is long.

    An exception whose own text cannot be made is named by its type.
    """
    frames = error.__traceback__
    while frames is not None and _is_caller(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
    return text[-_MAX_TRACEBACK_CHARACTERS:]


def _is_caller(filename: str) -> bool:
    path = Path(filename)
    return path.parent == Path(__file__).parent and path.name in _CALLERS

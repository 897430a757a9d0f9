"""A soft limit on the processor time of one scoring, for rewards that call libraries which may not end.

The hard limit is the worker's alarm, which ends the process. This one costs nothing but its own seconds: the process,
and what it has imported, stay. It works between two bytecodes; a single operation in C is left to the hard limit.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

_AGAIN_SECONDS = 0.05
_Result = TypeVar("_Result")


class _OutOfTimeError(BaseException):
    """No `except Exception` of a library may keep it."""


def within_cpu_seconds(seconds: float, function: Callable[[], _Result]) -> _Result | None:
    """What `function` returns, or None when it has used `seconds` of processor time first. Main thread only."""
    armed = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if armed:
            raise _OutOfTimeError

    previous = signal.signal(signal.SIGVTALRM, interrupt)
    try:
        # again and again: a destructor or a callback from C may swallow the first
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN_SECONDS)
        return function()
    except _OutOfTimeError:
        return None
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)

"""A soft limit on the CPU time of one scoring, for rewards that call libraries which may not return.

The hard limit, `reward.timeout_seconds`, is the alarm of the worker (workers/time_limit.py), which kills the process.
This soft limit keeps the process and its imports. It acts between two bytecodes, so a single long operation in C is
ended by the hard limit only.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

_AGAIN_SECONDS = 0.05
_Result = TypeVar("_Result")


class _OutOfTimeError(BaseException):
    """The limit has passed. It derives from BaseException so that no `except Exception` of a library catches it."""


def within_cpu_seconds(seconds: float, function: Callable[[], _Result]) -> _Result | None:
    """Return the result of `function`, or None when it used `seconds` of CPU time. Main thread only."""
    armed = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if armed:
            raise _OutOfTimeError

    previous = signal.signal(signal.SIGVTALRM, interrupt)
    try:
        # repeated: a destructor or a callback from C may swallow the first exception
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN_SECONDS)
        return function()
    except _OutOfTimeError:
        return None
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)

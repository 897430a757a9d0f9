"""The time limit of one job in a worker process: `reward.timeout_seconds` and `environment.timeout_seconds`.

The kernel's alarm kills the process that passes it. The alarm needs neither the interpreter (a catastrophic regular
expression never releases it) nor the parent. A job that disables the alarm is killed by the parent shortly afterwards
(`JsonWorker.is_late`; its callers are rewards/scoring_thread.py and environments/pool.py).

Asserted by tests/unit/workers/test_json_worker.py and tests/unit/rewards/test_pool.py.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TypeVar

_MAX_PROBLEM_CHARACTERS = 500
_Result = TypeVar("_Result")


def call_with_alarm(seconds: float, function: Callable[[], _Result]) -> tuple[_Result | None, str | None]:
    """Return (result, None), or (None, problem) when the function raises. After `seconds` the kernel kills the process.

    The default handler of the alarm is restored each time, because a user's function may have replaced it.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return function(), None
    except (Exception, SystemExit) as error:  # a failure of this job only; the worker continues
        return None, f"{type(error).__name__}: {error}"[:_MAX_PROBLEM_CHARACTERS]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

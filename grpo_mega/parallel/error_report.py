"""Report of an error that occurs on every rank of a job, such as a user's mistake: rank 0 reports it.

Asserted by tests/unit/parallel/test_error_report.py.
"""

from __future__ import annotations

import os
import sys
import time

from grpo_mega.types import UserError

_FIRST_RANK_REPORTS_SECONDS = 2.0


def report_error(error: UserError | RuntimeError, remedy: str = "") -> None:
    """Write the error to stderr, on other ranks than 0 after a wait in which the launcher normally ends them.

    So the message appears once if every rank has it, and it still appears if one rank alone has it.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_FIRST_RANK_REPORTS_SECONDS)
    sys.stderr.write(f"error: {error}; {remedy}\n" if remedy else f"error: {error}\n")
    sys.stderr.flush()

"""Exit codes of commands: 0 done, 2 the input is wrong, 1 a failure of the program or the machine.

Asserted by tests/unit/cli/test_exit_codes.py.
"""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from grpo_mega.types import UserError

# System errors that the user can correct: exit code 2. All other system errors: exit code 1.
_WRONG_INPUT = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)

Arguments = ParamSpec("Arguments")


def errors_as_exit_codes(
    *failures: type[Exception],
) -> Callable[[Callable[Arguments, int]], Callable[Arguments, int]]:
    """Return a decorator for the `main` of a command, which prints an expected error and returns its exit code.

    The error is one line on stderr. Every other exception is a defect of the program and leaves `main` with its
    traceback.

    Args:
        failures: expected types of errors besides UserError. Their messages must be clear without a traceback.
    """
    expected: tuple[type[Exception], ...] = (UserError, *failures)

    def decorate(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
        @functools.wraps(main)
        def main_with_exit_code(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except BrokenPipeError:  # the reader of the output has closed it (closed_pipe.py)
                raise
            except expected as error:
                print(f"error: {error}", file=sys.stderr)
                return exit_code_of(error)

        return main_with_exit_code

    return decorate


def exit_code_of(error: Exception) -> int:
    """Return 2 for UserError and for a system error that the user can correct, and 1 for any other error."""
    if isinstance(error, OSError):
        return 2 if error.errno in _WRONG_INPUT else 1
    return 2 if isinstance(error, UserError) else 1

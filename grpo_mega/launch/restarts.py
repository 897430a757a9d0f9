"""`--restarts N`: starts a failed job again, which continues from its newest checkpoint.

Asserted by tests/unit/launch/test_restarts.py.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence

from grpo_mega.launch.rendezvous import RendezvousError
from grpo_mega.types import UserError

_KEEP_FOLDER = "run.overwrite=false"


def take_restarts(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Return the number after `--restarts`, by default 0, and the other arguments.

    Raises:
        UserError: it is not a whole number >= 0.
    """
    rest, text = list(arguments), "0"
    for i, word in enumerate(rest):
        name, is_joined, value = word.partition("=")
        if name == "--restarts":
            text = value if is_joined else (rest[i + 1] if i + 1 < len(rest) else "")
            del rest[i : i + (1 if is_joined else 2)]
            break
    if not text.isdecimal():
        raise UserError(f"--restarts={text or '(missing)'} must be a whole number >= 0", remedy="write --restarts 3")
    return int(text), rest


def run_with_restarts(start: Callable[[Sequence[str]], int], arguments: Sequence[str], restarts: int) -> int:
    """Call `start` with the arguments, and again after each failure, at most `restarts` times. Return its exit code.

    Only exit code 1, a failure of the program or of a machine, is worth another start. All machines of a job fail
    together, so their launchers also start again together.

    Raises:
        UserError, RendezvousError: see `start`; a rendezvous that fails is tried again, too.
    """
    for number in range(1, restarts + 1):
        try:
            code = start(arguments)
        except RendezvousError as error:
            sys.stderr.write(f"error: {error}\n")
            code = 1
        if code != 1:
            return code
        sys.stderr.write(f"launch: restart {number} of {restarts}; the run continues from its newest checkpoint\n")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a launcher of several machines ignores it at its end
        if arguments[-1:] != [_KEEP_FOLDER]:
            arguments = [*arguments, _KEEP_FOLDER]  # the folder holds this run now
    return start(arguments)

"""The rollbacks of a run, `rollbacks.jsonl`: returns to a checkpoint that a rule of `guard.rules` asked for.

A rollback from step `failed_step` to the checkpoint after `checkpoint_step` steps changes every step after the
checkpoint: its seeds include one more attempt, and it uses the prompts that follow those that were used so far. Attempt
and prompts are functions of the step and of this file, so a run that is killed and continued makes the same steps.
Asserted by tests/unit/observe/test_rollbacks.py and tests/e2e/test_guard.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from grpo_mega.observe.atomic_files import to_json, write_atomically
from grpo_mega.types import UserError


@dataclass(frozen=True)
class Rollback:
    """One rollback: one line of the file.

    Attributes:
        failed_step: step in which the rule held.
        checkpoint_step: steps that the checkpoint has.
        rule: name of the rule.
        reason: what it found.
        wall_time: seconds since 1970.
    """

    failed_step: int
    checkpoint_step: int
    rule: str
    reason: str
    wall_time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Rollbacks:
    """The rollbacks of a run so far, in order."""

    each: Sequence[Rollback] = ()

    def attempt_of(self, step: int) -> int:
        """Return how often the run returned to a checkpoint before `step`."""
        return sum(rollback.checkpoint_step < step for rollback in self.each)

    def prompts_step_of(self, step: int) -> int:
        """Return the step, from 1, whose prompts `step` uses: `step` without rollbacks, later after them."""
        before = [rollback for rollback in self.each if rollback.checkpoint_step < step]
        return step + sum(rollback.failed_step - rollback.checkpoint_step for rollback in before)


def read_rollbacks(path: Path) -> Rollbacks:
    """Read the file; no file means no rollback.

    Raises:
        UserError: a line is not a rollback.
    """
    if not path.is_file():
        return Rollbacks()
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            found.append(Rollback(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}:{number} is not a JSON object with the keys of a rollback",
                remedy="restore the file; without it, steps after a rollback would be made with other prompts",
            ) from error
    return Rollbacks(tuple(found))


def record_rollback(path: Path, rollbacks: Rollbacks, rollback: Rollback) -> Rollbacks:
    """Write the rollbacks with one more, and return them. The file is whole at any moment."""
    longer = Rollbacks((*rollbacks.each, rollback))
    write_atomically(path, "".join(f"{to_json(asdict(each))}\n" for each in longer.each))
    return longer

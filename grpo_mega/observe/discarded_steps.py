"""Sets metrics and rollouts aside that a continued run makes again.

Asserted by tests/unit/observe/test_run_folder.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from grpo_mega.observe.atomic_files import TEMPORARY_SUFFIX, write_atomically
from grpo_mega.types import UserError

_STEP_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class DiscardedSteps:
    """Metrics lines and rollouts of steps after the checkpoint from which a run continues."""

    folder: Path
    steps: tuple[int, ...]


def set_aside_after(step: int, metrics: Path, rollouts: Path, discarded: Path) -> DiscardedSteps | None:
    """Move metrics lines and rollouts of steps after `step` to a new folder in `discarded`.

    A line or a file that a killed process left unfinished is removed. Parts of rollouts are moved unread, so that a
    damaged part of a step that is made again is no error.

    Args:
        step: last step that stays.
        metrics: `metrics.jsonl`.
        rollouts: folder of the rollouts, with a folder `step_NNNNNN` per step.
        discarded: parent of the new folder, which is named by the time.

    Returns:
        The steps that were moved, or None if there are none.

    Raises:
        UserError: a line of `metrics` is not a JSON object with a step.
    """
    steps: set[int] = set()
    target = _new_folder_name(discarded)
    if metrics.exists():
        lines = metrics.read_bytes().splitlines()
        step_of = [_line_step(metrics, lines, number) for number in range(len(lines))]
        kept = [line for line, of in zip(lines, step_of, strict=True) if of is not None and of <= step]
        later = {line: of for line, of in zip(lines, step_of, strict=True) if of is not None and of > step}
        if later:
            steps.update(later.values())
            target.mkdir(parents=True)
            write_atomically(target / metrics.name, b"".join(line + b"\n" for line in later))
        write_atomically(metrics, b"".join(line + b"\n" for line in kept))
    if rollouts.is_dir():
        for path in list(rollouts.iterdir()):
            named = _STEP_NAME.match(path.name)
            if named and _remove_unfinished(path):
                continue
            if named and int(named[1]) > step:
                steps.add(int(named[1]))
                (target / rollouts.name).mkdir(parents=True, exist_ok=True)
                path.rename(target / rollouts.name / path.name)
    return DiscardedSteps(target, tuple(sorted(steps))) if steps else None


def _remove_unfinished(path: Path) -> bool:
    """Remove what a killed process left unfinished: a temporary file, or those in the folder of a step. Return True if
    nothing of the path is left."""
    if path.is_dir():
        for temporary in path.glob(f"*{TEMPORARY_SUFFIX}"):
            temporary.unlink()
        if any(path.iterdir()):
            return False
        path.rmdir()
        return True
    if path.name.endswith(TEMPORARY_SUFFIX):
        path.unlink()
        return True
    return False


def _new_folder_name(parent: Path) -> Path:
    """Return a folder in `parent` that does not exist, named by the time in UTC. The clock may have jumped back."""
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    number, found = 1, parent / name
    while found.exists():
        number += 1
        found = parent / f"{name}-{number}"
    return found


def _line_step(metrics: Path, lines: Sequence[bytes], number: int) -> int | None:
    """Return the step of a line; None for a last line that is incomplete after a crash."""
    try:
        return int(json.loads(lines[number])["step"])
    except (ValueError, KeyError, TypeError) as error:
        if number == len(lines) - 1:
            return None
        raise UserError(
            f"{metrics}:{number + 1} is not a JSON object with a key `step`", remedy="repair or remove the line"
        ) from error


def move_aside(path: Path) -> Path:
    """Rename a folder to the first free name NAME.old-1, NAME.old-2, ..., and return that path."""
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(target)
    return target

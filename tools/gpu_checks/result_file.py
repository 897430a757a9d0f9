"""Result files of tools/gpu_proof.py: written by the part after every number, and completed by the command.

A file holds `part`, `status`, `rehearsal`, `seconds`, `main` (the main number, in words), `numbers`, `checks` and, if
something is missing, `why`. A check holds `name`, `found`, `limit`, `reason` (why this limit) and `passed`; a check of
device memory in a rehearsal has `passed: null`.

status          meaning
running         the part is running, or was ended from outside together with the command
measured        every number is there and every check passed, on a GPU
rehearsed       the same on a CPU: the program works, and no number says anything about a GPU
failed          a check failed, the part raised, or it was stopped; `why` has the reason, `numbers` what it had
skipped         the deadline left too little time; `why` has the seconds
not installed   a package that the part needs is missing; `why` names it
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RUNNING, MEASURED, REHEARSED = "running", "measured", "rehearsed"
FAILED, SKIPPED, NOT_INSTALLED = "failed", "skipped", "not installed"


class ResultFile:
    """The result of one part; every change is written at once."""

    def __init__(self, path: Path, part: str, *, rehearsal: bool) -> None:
        """Write the first state of the file, `running`."""
        self._path, self._rehearsal = path, rehearsal
        self.content: dict[str, Any] = {
            "part": part, "status": RUNNING, "rehearsal": rehearsal, "main": "", "numbers": {}, "checks": [],
        }  # fmt: skip
        self._write()

    def put(self, **content: Any) -> None:
        """Set top-level entries of the file."""
        self.content |= content
        self._write()

    def add(self, **numbers: Any) -> None:
        """Add numbers."""
        self.content["numbers"] |= numbers
        self._write()

    def check(self, name: str, found: Any, limit: Any, *, passed: bool | None, reason: str) -> None:
        """Add a check. `passed=None`: it was not made, because a rehearsal has no device."""
        self.content["checks"].append(
            {"name": name, "found": found, "limit": limit, "reason": reason, "passed": passed}
        )
        self._write()

    def close(self) -> None:
        """Set the final status from the checks."""
        failed = [check["name"] for check in self.content["checks"] if check["passed"] is False]
        if failed:
            self.put(status=FAILED, why=f"checks that failed: {', '.join(failed)}")
        else:
            self.put(status=REHEARSED if self._rehearsal else MEASURED)

    def _write(self) -> None:
        write_json(self._path, self.content)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader, or a kill at any moment, finds the old or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)

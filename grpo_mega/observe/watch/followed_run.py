"""Follows the files of a run folder, which another process writes, perhaps on another machine. Nothing is written.

Each poll opens the files again, because a network file system shows what others wrote only to a file that is opened
afterwards. A line without its end is kept for the next poll.
Asserted by tests/unit/observe/watch/test_followed_run.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from grpo_mega.observe.alarms import Alarm, Alarms
from grpo_mega.observe.history import History, numbers_of, parse_line
from grpo_mega.observe.rollout_files.plain_rows import RolloutRow
from grpo_mega.observe.rollout_files.reader import read_step, steps_of
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.types import UserError


class FollowedRun:
    """State of a run as its folder shows it.

    Args:
        path: the run folder, which may not exist yet or be empty.
    """

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.status = ""
        self.verdict: str | None = None
        self.total_steps: int | None = None
        self.rollouts: list[RolloutRow] = []
        self.last_written: float | None = None
        self.num_damaged = 0
        self._reset()

    @property
    def history(self) -> History:
        """Metrics of the steps so far."""
        return self._alarms.history

    @property
    def active_alarms(self) -> tuple[Alarm, ...]:
        """Alarms whose condition holds."""
        return self._alarms.active

    def poll(self) -> bool:
        """Read what is new; return True if a step was added."""
        before = self.history.steps[-1:]
        self._read_summary()
        self._read_total_steps()
        self._read_metrics()
        added = self.history.steps[-1:] != before
        if added:
            self._read_rollouts()
        return added

    def _reset(self) -> None:
        """Forget the metrics: the file was replaced, or a continued run makes steps again."""
        self._alarms = Alarms()
        self._offset, self._rest = 0, b""

    def _read_metrics(self) -> None:
        try:
            if self.folder.metrics.stat().st_size < self._offset:
                self._reset()
            with self.folder.metrics.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:  # not there yet, or being replaced
            return
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            self._add_line(line)

    def _add_line(self, text: bytes) -> None:
        found = parse_line(text)
        if found is None:
            self.num_damaged += 1
            return
        step, line = found
        wall_time = line.get("wall_time")
        self.last_written = wall_time if isinstance(wall_time, int | float) else self.last_written
        if "evaluation" in line or step == 0:  # an evaluation at an end of the run has no step of its own
            return
        if self.history.steps and step <= self.history.steps[-1]:
            kept = [(s, self.history.of_step(s)) for s in self.history.steps if s < step]
            self._alarms = Alarms()
            for earlier, values in kept:
                self._alarms.step(earlier, values)
        self._alarms.step(step, numbers_of(line))

    def _read_summary(self) -> None:
        try:
            found = json.loads(self.folder.summary.read_text(encoding="utf-8", errors="replace"))
        except (OSError, ValueError):
            return
        if isinstance(found, dict):
            self.status = str(found.get("status", ""))
            self.verdict = None if found.get("verdict") is None else str(found["verdict"])

    def _read_total_steps(self) -> None:
        try:
            config: Any = yaml.safe_load(self.folder.config.read_text(encoding="utf-8", errors="replace"))
            self.total_steps = int(config["train"]["steps"])
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
            return

    def _read_rollouts(self) -> None:
        """Read the best and the worst rollout of the last step that has some."""
        columns = ("prompt", "completion", "reward", "stop_reason", "group", "member")
        try:
            steps = steps_of(self.folder.rollouts)
            found = read_step(self.folder.rollouts / f"step_{steps[-1]:06d}", columns) if steps else None
        except (UserError, OSError):  # being written, or of an older version
            return
        if found is not None and found.table.num_rows:
            ordered = found.table.sort_by([("reward", "descending")])
            ends = [0] if ordered.num_rows == 1 else [0, ordered.num_rows - 1]
            self.rollouts = list(found.rows(ordered.take(ends)))

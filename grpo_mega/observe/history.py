"""The metrics of a run's steps in memory, from which alarms and the verdict are derived."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class History:
    """Steps of a run and their metrics, in order. A value that is missing or not finite has no entry."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._values: dict[str, dict[int, float]] = {}

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of the next step, or replace values of the last one."""
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
        for name, value in metrics.items():
            if math.isfinite(value):
                self._values.setdefault(name, {})[step] = float(value)
            else:
                self._values.get(name, {}).pop(step, None)

    def names(self, prefix: str) -> list[str]:
        """Return the names with this prefix."""
        return sorted(name for name in self._values if name.startswith(prefix))

    def last(self, name: str) -> float | None:
        """Return the value of the last step, or None."""
        return self._values.get(name, {}).get(self.steps[-1]) if self.steps else None

    def latest(self, name: str) -> tuple[int, float] | None:
        """Return the last step that has a value, and the value; None if no step has one."""
        found = self._values.get(name)
        return None if not found else next(reversed(found.items()))

    def of_step(self, step: int) -> dict[str, float]:
        """Return all values of a step."""
        return {name: values[step] for name, values in self._values.items() if step in values}

    def first(self, name: str, steps: int) -> list[float]:
        """Return the values of the first `steps` steps."""
        return self._of(name, self.steps[:steps])

    def recent(self, name: str, steps: int, skip: int = 0) -> list[float]:
        """Return the values of the last `steps` steps before the last `skip`."""
        end = len(self.steps) - skip
        return self._of(name, self.steps[max(0, end - steps) : max(0, end)])

    def all(self, name: str) -> list[float]:
        """Return the values of all steps that have one."""
        return list(self._values.get(name, {}).values())

    def _of(self, name: str, steps: list[int]) -> list[float]:
        found = self._values.get(name, {})
        return [found[step] for step in steps if step in found]


def read_lines(metrics: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and metrics of each step in `metrics.jsonl`.

    Lines that cannot be read are skipped, and so are the evaluations at both ends of the run.
    """
    if not metrics.exists():
        return
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        found = parse_line(line)
        if found is not None and "evaluation" not in found[1]:
            yield found[0], numbers_of(found[1])


def parse_line(line: str | bytes) -> tuple[int, dict[str, Any]] | None:
    """Return the step and the other values of a line of `metrics.jsonl`; None if the line is damaged."""
    try:
        values = json.loads(line)
        step = values.pop("step")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (step, values) if type(step) is int else None


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics among the values of a line: its numbers, without the time at which it was written."""
    return {name: _number(v) for name, v in values.items() if isinstance(v, int | float) and name != "wall_time"}


def _number(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def mean(values: list[float]) -> float:
    """Return the mean of at least one value."""
    return statistics.fmean(values)

"""Reads a run folder for the report: complete, half-written, being written, of a killed run, or of an older version.

A file that is missing or damaged becomes a sentence in `problems`; what can be read is read. Nothing is written.
Asserted by tests/unit/observe/report/test_run_data.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from grpo_mega.config.resume_effects import UNSET, default_value
from grpo_mega.observe.alarms import Alarm, Alarms
from grpo_mega.observe.history import History, numbers_of, parse_line
from grpo_mega.observe.metric_row import SECTIONS
from grpo_mega.observe.metric_table import metric_of
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.summary import Evaluation
from grpo_mega.observe.verdict import verdict
from grpo_mega.types import UserError

MAX_POINTS = 2000
"""Points of a curve; of a longer run every second, third, ... step is shown, and the last one."""
MAX_TIMELINE_STEPS = 200
"""Steps of the timeline of phases: the last 50, and others at equal distances."""


@dataclass
class RunData:
    """The content of a report about one run, besides its rollouts.

    Attributes:
        curves: metric -> value per entry of `steps`, None where it has none.
        problems: a sentence per file that could not be read, or only in part.
    """

    path: Path
    steps: list[int] = field(default_factory=list)
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    verdict: list[str] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    timeline: list[dict[str, Any]] = field(default_factory=list)
    raw_config: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def charts(self) -> list[dict[str, Any]]:
        """Return section, title, unit and names of each chart, in the order of the metric table."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        place = {section: number for number, section in enumerate(SECTIONS)}
        rows = {name: metric_of(name) for name in self.curves}
        for name, row in sorted(rows.items(), key=lambda item: place[item[1].section] if item[1] else len(place)):
            section, title = (row.section, row.chart) if row is not None else ("other", name)
            chart = found.setdefault(
                (section, title), {"section": section, "title": title, "unit": row.unit if row else "", "names": []}
            )
            chart["names"].append({"name": name, "meaning": row.meaning if row else ""})
        return list(found.values())


def read_run(path: Path) -> RunData:
    """Read a run folder.

    Raises:
        UserError: the folder does not exist, or holds none of the files of a run.
    """
    folder = RunFolder(path)
    if not path.is_dir():
        raise UserError(f"RUN_DIR={path} was not found", "name the folder of a run (run.dir)")
    if not any(p.exists() for p in (folder.config, folder.metrics, folder.summary)):
        raise UserError(
            f"RUN_DIR={path} holds none of config.yaml, metrics.jsonl and summary.json",
            "name the folder of a run (run.dir); a run writes them when it starts",
        )
    data = RunData(path)
    data.summary = _read_object(folder.summary, data.problems)
    data.raw_config = _read_yaml(folder.config, data.problems)
    data.config = {key: _text(value) for key, value in flatten(data.raw_config).items()}
    data.defaults = {
        key: "" if (value := default_value(key, data.raw_config)) is UNSET else _text(_plain(value))
        for key in data.config
    }
    history = _read_metrics(folder.metrics, data)
    data.changes = [line for line in _read_objects(folder.config_changes) if "after_step" in line]
    data.timeline = _chosen({line["step"]: line for line in _read_objects(folder.timeline) if _is_timeline(line)})
    data.checkpoints = _checkpoints(folder, data.problems)
    data.alarms, data.verdict = _verdict(history, data)
    return data


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {'a.b': 1} for {'a': {'b': 1}}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing: the run has not started to train, or was ended before it")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} is not an object")
        return {}
    return found


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return {}
    except (OSError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read ({' '.join(str(error).split())})")
        return {}
    return found if isinstance(found, dict) else {}


def _read_objects(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; other lines are left out."""
    found: list[dict[str, Any]] = []
    for text in _lines(path):
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            found += [line] if isinstance(line, dict) else []
    return found


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file


def _is_timeline(line: Mapping[str, Any]) -> bool:
    """Return True for a line as `rank_reports.append_timeline` writes it."""
    try:
        spans = [span for of_rank in line["ranks"].values() for span in of_rank]
        named = all(isinstance(phase, str) and start + seconds >= 0 for phase, start, seconds in spans)
        return type(line["step"]) is int and isinstance(line["hosts"], dict) and named
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _read_metrics(metrics: Path, data: RunData) -> History:
    history = History()
    by_step: dict[int, dict[str, float]] = {}
    found = [parse_line(text) for text in _lines(metrics)]
    for step, values in filter(None, found):
        by_step[step] = by_step.get(step, {}) | numbers_of(values)
    if damaged := found.count(None):
        data.problems.append(f"{damaged} line(s) of {metrics.name} cannot be read; the last one may be half-written")
    for step in sorted(by_step):
        if len(by_step[step]) > 0:
            history.add(step, by_step[step])
    stride = -(-len(by_step) // MAX_POINTS) or 1
    steps = sorted(by_step)
    data.steps = sorted({*steps[::stride], *steps[-1:]})
    names = dict.fromkeys(name for step in data.steps for name in by_step[step])
    for name in names:
        data.curves[name] = [_short(by_step[step].get(name)) for step in data.steps]
    if stride > 1:
        data.problems.append(f"curves show one of {stride} steps, because the run has {len(by_step):,}")
    return history


def _short(value: float | None) -> float | None:
    """Return the value with six significant digits, or None if it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _chosen(lines: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    steps = sorted(lines)
    spaced = MAX_TIMELINE_STEPS - 50
    earlier = steps[:-50]
    chosen = earlier[:: max(1, -(-len(earlier) // spaced))] + steps[-50:]
    return [lines[step] for step in chosen]


def _checkpoints(folder: RunFolder, problems: list[str]) -> list[dict[str, Any]]:
    try:
        complete = folder.complete_checkpoints()
        everything = folder.all_checkpoints()
    except UserError as error:
        problems.append(str(error))
        return []
    return [{"step": step, "path": str(p), "complete": step in complete} for step, p in everything.items()]


def _verdict(history: History, data: RunData) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the alarms and two sentences: how far the run came, and whether it learned."""
    summary, alarms = data.summary, Alarms()
    for step in history.steps:
        alarms.step(step, history.of_step(step))
    raised = [vars(alarm).copy() for alarm in alarms.raised]
    shown = _known_alarms(summary.get("alarms")) or raised
    status, error = str(summary.get("status")), summary.get("error")
    states = {
        "done": "is done",
        "failed": "failed",
        "interrupted": "was stopped" if error else "is running or was killed",
    }
    reason = f": {error}" if error and status == "failed" else ""
    last = history.steps[-1] if history.steps else 0
    sentences = [f"The run {states.get(status, 'has no summary yet')} after step {last}{reason}."]
    found = summary.get("verdict")
    if not found:
        before, after = (_evaluation(summary.get(key)) for key in ("eval_before", "eval_after"))
        if before is not None and after is None and (latest := history.latest("eval/accuracy")) is not None:
            after = Evaluation(
                latest[1], before.reward_mean, before.length_mean, before.num_prompts
            )  # of the run so far
        found = verdict(history, alarms.raised, before, after)
    sentences.append(f"It {found}." if found else "It has too few steps for a verdict.")
    return shown, sentences


def _known_alarms(stored: Any) -> list[dict[str, Any]]:
    """Return the alarms of a summary that have all values of an alarm."""
    names = {field.name for field in fields(Alarm)}
    return [a for a in stored if isinstance(a, dict) and set(a) >= names] if isinstance(stored, list) else []


def _evaluation(values: Any) -> Evaluation | None:
    try:
        return Evaluation.read(values) if isinstance(values, dict) else None
    except (TypeError, ValueError, AttributeError):
        return None

"""Makes the HTML page of a report: the data as JSON, and the scripts and styles of page/ inside.

The data is inert: `<`, `>` and `&` are escaped in the JSON text, and the scripts of the page put texts of models into
the document as text nodes only. A content security policy forbids every request.
Asserted by tests/unit/observe/report/test_page.py and, in a browser, tests/e2e/test_report_page_long.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from grpo_mega.observe.report.rollout_sample import RolloutSample
from grpo_mega.observe.report.run_data import RunData
from grpo_mega.observe.safe_text import html_text, printable

_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026", 0x2028: "\\u2028", 0x2029: "\\u2029"}


_SUMMARY_KEYS = ("seconds", "layout", "versions", "eval_before", "eval_after", "tuning")


def report_page(runs: Sequence[tuple[RunData, RolloutSample]]) -> str:
    """Return the page of one run, or of two runs that are compared."""
    data = {"runs": [_run_record(*run) for run in runs], "differences": _differences([run for run, _ in runs])}
    title = " against ".join(html_text(run.path.name or str(run.path), 200) for run, _ in runs)
    parts = {
        "TITLE": title,
        "STYLE": _asset("uPlot.min.css") + _asset("report.css"),
        "DATA": json_text(data),
        "LIBRARY": _asset("uPlot.iife.min.js"),
        "SCRIPT": _asset("report.js"),
    }
    page = _asset("report.html")
    before, *rest = page.split("@@")
    return before + "".join(parts[part] if i % 2 == 0 else part for i, part in enumerate(rest))


def json_text(data: Any) -> str:
    """Return JSON that can stand inside a script element: no `<`, no line separator, no lone surrogate."""
    return json.dumps(_clean(data), ensure_ascii=True, separators=(",", ":")).translate(_ESCAPES)


def _clean(value: Any) -> Any:
    """Return the value with printable texts; numbers that JSON does not have become None."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if isinstance(value, bool | int | float) or value is None else printable(str(value))


def _asset(name: str) -> str:
    return (files("grpo_mega.observe.report") / "page" / name).read_text(encoding="utf-8")


def _run_record(run: RunData, sample: RolloutSample) -> dict[str, Any]:
    changed = {k: v for k, v in run.config.items() if v != run.defaults.get(k, "")}
    return {
        "path": str(run.path),
        "verdict": run.verdict,
        "problems": [*run.problems, *sample.problems],
        "steps": run.steps,
        "curves": run.curves,
        "charts": run.charts(),
        "alarms": run.alarms,
        "timeline": run.timeline,
        "rollouts": {"rule": sample.rule, "groups": sample.groups},
        "worst": sample.worst,
        "checkpoints": run.checkpoints,
        "config": [[key, value, run.defaults.get(key, "")] for key, value in changed.items()],
        "num_defaults": len(run.config) - len(changed),
        "changes": run.changes,
        "summary": {k: run.summary.get(k) for k in _SUMMARY_KEYS},
        "guards": {k: v for k, v in run.config.items() if k.startswith("guard.")},
    }


def _differences(runs: Sequence[RunData]) -> list[list[str]]:
    """Return [key, value of the first run, value of the second run] of each key of the config that differs."""
    if len(runs) < 2:
        return []
    first, second = runs[0].config, runs[1].config
    keys = dict.fromkeys([*first, *second])
    return [[k, first.get(k, "unset"), second.get(k, "unset")] for k in keys if first.get(k) != second.get(k)]

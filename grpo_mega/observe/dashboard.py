"""The TensorBoard dashboard of a run: which curves share a chart, and which charts a section has.

Derived from the metric table, so that a new row appears in the dashboard without further work.
Asserted by tests/unit/observe/test_dashboard.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from grpo_mega.observe.metric_row import SECTIONS, Section
from grpo_mega.observe.metric_table import METRICS, metric_of

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

Charts = dict[Section, dict[str, list[str]]]
"""Section -> title of a chart -> names of its curves."""


def dashboard_charts(names: Iterable[str]) -> Charts:
    """Return the charts of these metrics, sections and charts in the order of the table, curves in alphabetical order.

    Raises:
        KeyError: a name is not in the metric table.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(set(names)):
        row = metric_of(name)
        if row is None:
            raise KeyError(f"metric={name} is not in observe/metric_table.py; add a row to the table")
        found.setdefault((row.section, row.chart), []).append(name)
    charts: Charts = {}
    for section in SECTIONS:
        titles = dict.fromkeys(row.chart for row in METRICS.values() if row.section == section)
        own = {title: found[section, title] for title in titles if (section, title) in found}
        if own:
            charts[section] = own
    return charts


def dashboard_summary(names: Iterable[str]) -> Summary:
    """Return the layout of TensorBoard's tab "Custom Scalars" for these metrics. The last layout of a run counts.

    Raises:
        KeyError: a name is not in the metric table.
    """
    from torch.utils.tensorboard.summary import custom_scalars

    # TensorBoard reads a tag as a regular expression that matches the beginning of a name.
    layout = {
        section: {
            _with_unit(title, curves): ["Multiline", [f"{re.escape(name)}$" for name in curves]]
            for title, curves in charts.items()
        }
        for section, charts in dashboard_charts(names).items()
    }
    return custom_scalars(layout)


def _with_unit(title: str, curves: list[str]) -> str:
    """Return the title of a chart with the unit of its curves, which all have the same one."""
    row = metric_of(curves[0])
    assert row is not None, f"{curves[0]} was found in the table"
    return title if row.unit in title or row.unit in ("1", "as above") else f"{title} ({row.unit})"

"""Sections, charts and curves of the TensorBoard dashboard."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from tensorboard.plugins.custom_scalar import layout_pb2

from grpo_mega.observe.dashboard import dashboard_charts, dashboard_summary
from grpo_mega.observe.metric_row import SECTIONS
from grpo_mega.observe.metric_table import METRICS


def names_of_every_row() -> list[str]:
    return [name.replace("*", "x") for name in METRICS]


def read_layout(names: list[str]) -> layout_pb2.Layout:
    (value,) = dashboard_summary(names).value
    assert value.metadata.plugin_data.plugin_name == "custom_scalars"
    return layout_pb2.Layout.FromString(value.tensor.string_val[0])


def test_every_metric_is_in_one_chart_of_its_section() -> None:
    charts = dashboard_charts(names_of_every_row())
    assert tuple(charts) == SECTIONS
    curves = Counter(name for section in charts.values() for names in section.values() for name in names)
    assert curves == Counter(names_of_every_row())
    assert "train/kl" in charts["policy health"]["KL to the reference"]
    assert charts["learning"]["accuracy"] == ["eval/accuracy", "eval/greedy_accuracy", "reward/accuracy"]


def test_a_chart_without_a_curve_is_left_out() -> None:
    assert dashboard_charts(["reward/mean"]) == {"learning": {"reward": ["reward/mean"]}}


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError, match="metric=reward/avg is not in"):
        dashboard_charts(["reward/avg"])


def test_the_layout_selects_exactly_the_curves_of_each_chart() -> None:
    names = names_of_every_row()
    layout = read_layout(names)
    assert [category.title for category in layout.category] == list(SECTIONS)
    charts = dashboard_charts(names)
    for category in layout.category:
        for chart, curves in zip(category.chart, charts[category.title].values(), strict=True):
            selected = [name for tag in chart.multiline.tag for name in names if re.match(tag, name)]
            assert selected == curves
    time = next(category for category in layout.category if category.title == "time")
    assert "phases (seconds)" in [chart.title for chart in time.chart]

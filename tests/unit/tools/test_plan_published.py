"""tools/plan_published.py: the planner's seconds against published steps, and the page with its tables."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from grpo_mega.planner.hardware import Assumptions
from grpo_mega.types import UserError

TOOL = Path(__file__).resolve().parents[3] / "tools" / "plan_published.py"


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("plan_published_under_test", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


@pytest.fixture(scope="module")
def steps(tool: ModuleType) -> list[Any]:
    found: list[Any] = tool.compare_all()
    return found


def test_the_median_factor_is_at_most_1_4_and_rows_above_2_have_a_reason(tool: ModuleType, steps: list[Any]) -> None:
    assert len(steps) >= 8
    assert statistics.median(step.factor for step in steps) <= 1.4
    assert [step.row["name"] for step in steps if step.factor > 2 and not step.row.get("reason")] == []
    assert tool.missed_bars(steps) == []


def test_rows_that_nothing_was_fitted_to_are_predicted_as_well(steps: list[Any]) -> None:
    held_out = [step for step in steps if not step.is_fitted]
    assert len(held_out) >= 2
    assert statistics.median(step.factor for step in held_out) <= 1.4


def test_every_row_has_a_source_and_its_numbers_are_shared(tool: ModuleType, steps: list[Any]) -> None:
    assumptions = {json.dumps(
        {k: v for k, v in step.plan.inputs.assumptions.described().items() if k != "mean_length"}
    ) for step in steps}  # fmt: skip
    assert len(assumptions) == 1
    rows = yaml.safe_load(tool.ROWS.read_text(encoding="utf-8"))["rows"]
    names = {*Assumptions.names(), tool.PUBLISHED_SYNC_SECONDS.__class__.__name__, "published_sync_seconds"}
    for row in rows:
        assert row["source"]
        assert set(row.get("fitted", [])) <= names


def test_the_page_has_the_tables_that_the_command_writes(tool: ModuleType, steps: list[Any]) -> None:
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.page_with(tool.tables(steps), page) == page
    with pytest.raises(UserError, match="does not contain"):
        tool.page_with("", "no marks")


def test_a_row_above_2_without_a_reason_and_a_high_median_are_reported(tool: ModuleType, steps: list[Any]) -> None:
    slow = [replace(step, row=step.row | {"published": {"step": 3 * step.predicted}, "reason": None}) for step in steps]
    missed = tool.missed_bars(slow)
    assert len(missed) == len(steps) + 1
    assert "factor 3.00 is above 2" in missed[0]
    assert "the median factor 3.00 is above 1.4" in missed[-1]


def test_a_published_sync_gathers_every_tensor_on_every_gpu(tool: ModuleType, steps: list[Any]) -> None:
    dense = next(step for step in steps if step.row["name"] == "NeMo-RL, Llama-3.1-70B")
    weights = 2 * dense.plan.parameters
    assert tool.gathered_sync_seconds(dense.plan) == pytest.approx(weights / (0.7 * 50e9) + 5)
    assert dense.phases["sync"] > 3 * dense.plan.time.phases["sync"]

"""tools/bench_step.py: the arithmetic between the timed steps and the reported ratios."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[3] / "tools" / "bench_step.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_step_under_test", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_ratios_compare_medians_per_rollout_per_token_and_per_cpu_second(bench: ModuleType) -> None:
    ours = [bench.SideTime(seconds, 1.0, 10, 100, {"train": seconds}) for seconds in (1.0, 2.0, 50.0)]
    trl = [bench.SideTime(seconds, 3.0, 10, 50, {"train": seconds}) for seconds in (8.0, 8.0, 8.0)]
    found = bench.Comparison(ours, trl)
    assert found.ratio == pytest.approx(4.0)
    assert found.ratio_per_token == pytest.approx(8.0)
    assert found.cpu_ratio == pytest.approx(3.0)
    assert found.as_json()["ours"]["seconds_min"] == 1.0
    assert found.as_json()["ours"]["phases"] == {"train": 2.0}


def test_length_spread_takes_percentiles_by_nearest_rank(bench: ModuleType) -> None:
    found = bench.length_spread(list(range(100, 0, -1)))
    assert (found["p50"], found["p95"], found["max"]) == (50, 95, 100)
    assert found["p95_over_p50"] == pytest.approx(1.9)


def test_the_first_side_of_a_comparison_alternates(bench: ModuleType) -> None:
    order: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self, given: object) -> tuple[object, None]:
            order.append(self.name)
            return bench.SideTime(1.0, 1.0, 1, 1, {}), None

    bench.alternate((Fake("ours"), Fake("trl")), 3)
    assert order == ["ours", "trl", "trl", "ours", "ours", "trl"]

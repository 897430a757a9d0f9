"""tools/bench_simulator.py: the fit of the engine's costs, and the comparison of simulated and measured steps."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
FACTORS = np.array([0.02, 0.001, 0.004, 0.0002, 1e-7, 0.00005])


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("bench_simulator_under_test", TOOLS / "bench_simulator.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def calls_of(bench: ModuleType) -> list[dict[str, float]]:
    rng, calls = np.random.default_rng(0), []
    for _ in range(60):
        values = [float(v) for v in rng.integers(1, (200, 300, 20_000, 3_000_000, 5_000))]
        calls.append(dict(zip(bench.FEATURES, values, strict=True)))
        calls[-1]["cpu_seconds"] = float(FACTORS @ [1.0, *values])
    return calls


def test_the_fit_finds_the_costs_behind_the_calls(bench: ModuleType) -> None:
    cost, error = bench.fitted_cost(calls_of(bench), 4)
    assert error < 1e-6
    found = [cost.call, cost.submitted_rollout, cost.read[0], cost.read[4] - cost.read[3], cost.cached_token]
    assert [*found, cost.prefill_token] == pytest.approx(FACTORS.tolist(), rel=1e-6)


def test_no_cost_is_negative(bench: ModuleType) -> None:
    calls = calls_of(bench)
    for call in calls:
        call["cpu_seconds"] -= 0.0015 * call["rollouts"]  # a rollout would cost -0.5 ms
        call["cpu_seconds"] = max(call["cpu_seconds"], 0.01)
    cost, _ = bench.fitted_cost(calls, 4)
    assert min(cost.call, cost.submitted_rollout, cost.read[0], cost.cached_token, cost.prefill_token) >= 0


def test_the_error_is_that_of_whole_steps(bench: ModuleType) -> None:
    groups = [[20] * bench.GROUP for _ in range(bench.PER_STEP)]
    rollouts = bench.PER_STEP * bench.GROUP
    tokens = 20 * rollouts
    engine = float(FACTORS[:4] @ [1, rollouts, 20, tokens]) + FACTORS[4] * rollouts * (12 * 20 + 190)
    engine += FACTORS[5] * bench.PER_STEP * 12
    policy = 1e-4 * (tokens + 12 * rollouts)
    step = {"cpu_seconds": engine + policy, "engine_cpu_seconds": engine, "seconds": 9.0, "groups": groups}
    slow = step | {"cpu_seconds": 2 * (engine + policy)}
    found = bench.compare([step], calls_of(bench), {"synchronous": [step], "partial": [slow]})
    assert found["modes"]["synchronous"]["error"] == pytest.approx(0, abs=1e-6)
    assert found["modes"]["synchronous"]["simulated_engine_seconds"] == pytest.approx(engine)
    assert found["largest_error"] == pytest.approx(abs(found["modes"]["partial"]["error"]))

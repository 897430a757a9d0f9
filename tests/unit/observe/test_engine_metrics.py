"""Metrics of the engines, from gauges whose numbers are known."""

from __future__ import annotations

import pytest

from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.observe.engine_metrics import EngineWork, engine_metrics, wait_metrics
from grpo_mega.observe.metric_table import require_known


def gauges(*readings: tuple[int, int, float]) -> EngineGauges:
    found = EngineGauges()
    for reading in readings:
        found.add_reading(*reading)
    found.add_request(prompt_tokens=40, cached_tokens=10, completion_tokens=30, preemptions=2)
    return found


def test_means_are_over_readings_and_rates_of_a_replica_count_its_shards_once() -> None:
    first = EngineWork(0, gauges((4, 2, 0.5), (2, 0, 0.25), (0, 0, 0.0)), environment_failures=1, tool_errors=3)
    second = EngineWork(0, gauges((8, 0, 1.0)))
    third = EngineWork(1, gauges())
    found = engine_metrics([(first, 2.0), (second, 3.0), (third, 6.0)])
    assert found == {
        "rollout/environment_failures": 1.0,
        "rollout/tool_errors": 3.0,
        "engine/preemptions": 6.0,
        "engine/running_requests_mean": 14 / 4,
        "engine/running_requests_max": 8.0,
        "engine/waiting_requests_mean": 0.5,
        "engine/waiting_requests_max": 2.0,
        "engine/kv_cache_fraction_mean": 1.75 / 4,
        "engine/kv_cache_fraction_max": 1.0,
        "engine/prefix_hit_fraction": 0.25,
        "engine/tokens_per_second/0": 60 / 3,
        "engine/tokens_per_second/1": 30 / 6,
    }
    require_known(found)


def test_without_an_engine_there_are_no_metrics() -> None:
    assert engine_metrics([]) == {}
    assert wait_metrics([({"train": 2.0}, 2.0, 0.0)]) == {}


def test_each_side_waits_while_the_other_one_works() -> None:
    first = {"rollout": 5.0, "reward": 1.0, "train": 3.0, "evaluation": 2.0}
    second = {"rollout": 6.0, "train": 3.0, "evaluation": 2.0}
    found = wait_metrics([(first, 11.5, 2.0), (second, 11.5, 6.0)])
    assert found["wait/policy_seconds"] == pytest.approx(6.0)
    assert found["wait/engine_seconds"] == pytest.approx((7.5 + 3.5) / 2)
    require_known(found)

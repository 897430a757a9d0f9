"""grpo_mega.observe.hardware.reduction: mean, min, max, and the place of the outlier."""

from __future__ import annotations

from grpo_mega.observe.hardware.reduction import gpu_metrics, host_metrics, rank_metrics
from grpo_mega.observe.hardware.sampler import NodeReading
from grpo_mega.observe.metric_table import require_known


def test_the_outlier_is_named_by_node_and_gpu() -> None:
    clocks = [1700.0, 1710.0, 1690.0, 1700.0]
    nodes = [
        NodeReading("a", {}, (0, 1, 2, 3), {"sm_clock_mhz": [*clocks]}),
        NodeReading("b", {}, (4, 5, 6, 7), {"sm_clock_mhz": [1700.0, None, 900.0, 1700.0]}),
    ]
    assert gpu_metrics(nodes) == {
        "gpu/sm_clock_mhz_mean": (sum(clocks) + 1700 + 900 + 1700) / 7,
        "gpu/sm_clock_mhz_min": 900.0,
        "gpu/sm_clock_mhz_max": 1710.0,
        "gpu/sm_clock_mhz_outlier_node": 1.0,
        "gpu/sm_clock_mhz_outlier_gpu": 6.0,
    }


def test_equal_values_have_no_outlier_and_one_value_has_only_a_mean() -> None:
    equal = [NodeReading("a", {"cpu_utilization": 0.5}), NodeReading("b", {"cpu_utilization": 0.5})]
    assert set(host_metrics(equal)) == {f"host/cpu_utilization_{x}" for x in ("mean", "min", "max")}
    assert host_metrics(equal[:1]) == {"host/cpu_utilization_mean": 0.5}
    assert gpu_metrics(equal) == {}


def test_ranks_are_reduced_with_the_rank_of_the_outlier() -> None:
    found = rank_metrics("rank", [{"train_seconds": 1.0}, {"train_seconds": 1.2}, {"train_seconds": 5.0}])
    assert found["rank/train_seconds_outlier_rank"] == 2.0
    assert (found["rank/train_seconds_min"], found["rank/train_seconds_max"]) == (1.0, 5.0)
    require_known(found)

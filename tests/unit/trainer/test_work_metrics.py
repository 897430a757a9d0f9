"""grpo_mega.trainer.work_metrics by hand."""

from __future__ import annotations

import pytest

from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.models.flops import forward_flops
from grpo_mega.observe.metric_table import require_known
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.hardware import device_peak_flops
from grpo_mega.trainer.work_metrics import WorkMetrics
from tests.helpers.family_configs import raw_family_config

SPEC = spec_from_config(raw_family_config("qwen3"), "test")
TIMES = {"time/train_seconds": 2.0, "time/step_seconds": 8.0}
LENGTHS = [10, 20, 30]


def test_mfu_of_the_phase_and_of_the_step() -> None:
    flops = 2 * 3 * forward_flops(SPEC, LENGTHS)
    found = WorkMetrics(SPEC, Topology(4, 2, 1), epochs=2, peak_flops=1e9).of_step(LENGTHS, [3], TIMES)
    assert found == {
        "throughput/update_flops": flops,
        "throughput/train_flops_per_second": flops / 8,
        "throughput/train_mfu": pytest.approx(flops / 2 / 4e9),
        "throughput/mfu": pytest.approx(flops / 8 / 4e9),
    }
    require_known(found)


def test_an_unknown_device_has_no_mfu() -> None:
    found = WorkMetrics(SPEC, Topology(1), 1, peak_flops=None).of_step(LENGTHS, [3], TIMES)
    assert set(found) == {"throughput/update_flops", "throughput/train_flops_per_second"}


def test_the_bubble_of_a_pipeline() -> None:
    of_4 = WorkMetrics(SPEC, Topology(4, 1, 4), 1, None).of_step(LENGTHS, [8, 4], TIMES)
    assert of_4["train/bubble_fraction"] == pytest.approx(3 / 9)
    interleaved = WorkMetrics(SPEC, Topology(2, 1, 2, vpp=2), 1, None).of_step(LENGTHS, [6], TIMES)
    assert interleaved["train/bubble_fraction"] == pytest.approx(1 / 13)
    require_known(interleaved)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_comes_from_the_planners_table(device: str, expected: float | None) -> None:
    assert device_peak_flops(device) == expected

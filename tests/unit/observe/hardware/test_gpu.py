"""grpo_mega.observe.hardware.gpu against a fake NVML of eight GPUs, with the real constants and error classes."""

from __future__ import annotations

import logging

import pytest

from grpo_mega.observe.hardware.gpu import QUANTITIES, GpuReader, open_gpus
from tests.helpers.fake_nvml import REAL, FakeNvml


def test_every_quantity_is_read_in_its_unit() -> None:
    nvml = FakeNvml()
    nvml.gpus[3].reasons = REAL.nvmlClocksEventReasonHwThermalSlowdown
    nvml.gpus[4].reasons = REAL.nvmlClocksEventReasonSwPowerCap | REAL.nvmlClocksEventReasonGpuIdle
    nvml.gpus[5].energy, nvml.gpus[5].link_kib = 2_500_000, 7
    nvml.gpus[6].ecc = {REAL.NVML_MEMORY_ERROR_TYPE_CORRECTED: 5, REAL.NVML_MEMORY_ERROR_TYPE_UNCORRECTED: 2}
    found = GpuReader(nvml, {}).read()
    assert set(found) == set(QUANTITIES)
    assert found["utilization"] == [0.9] * 8
    assert found["memory_used_bytes"][1] == 61 * 2**30
    assert found["power_watts"][0] == 650.0
    assert found["energy_joules"][5] == 2500.0
    assert found["temperature_celsius"] == [60.0 + i for i in range(8)]
    assert (found["sm_clock_mhz"][0], found["memory_clock_mhz"][0]) == (1755.0, 2619.0)
    assert found["throttled_fraction"] == [0, 0, 0, 1, 0, 0, 0, 0]  # the power cap is no fault
    assert found["power_capped_fraction"] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert (found["nvlink_sent_bytes"][5], found["nvlink_received_bytes"][5]) == (7 * 1024, 14 * 1024)
    assert (found["pcie_sent_bytes_per_second"][0], found["pcie_received_bytes_per_second"][0]) == (3e6, 5e6)
    assert (found["ecc_corrected"][6], found["ecc_uncorrected"][6]) == (5, 2)


def test_an_unsupported_quantity_is_left_out_with_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml(unsupported=("ecc", "nvlink"))
    with caplog.at_level(logging.INFO):
        reader = GpuReader(nvml, {})
        for _ in range(3):
            found = reader.read()
    left_out = {"ecc_corrected", "ecc_uncorrected", "nvlink_sent_bytes", "nvlink_received_bytes"}
    assert set(QUANTITIES) - set(found) == left_out
    assert sorted(record.getMessage().split("_*")[0] for record in caplog.records) == [
        f"gpu/{n}" for n in sorted(left_out)
    ]
    assert nvml.calls.count("ecc") == 2 * 8  # not asked again


def test_a_gpu_that_is_lost_has_no_value_and_the_others_keep_theirs(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml()
    nvml.gpus[2].failing = {"power": REAL.NVML_ERROR_GPU_IS_LOST}
    reader = GpuReader(nvml, {})
    for _ in range(3):
        assert reader.read()["power_watts"] == [650.0, 650.0, None, 650.0, 650.0, 650.0, 650.0, 650.0]
    assert [r.getMessage() for r in caplog.records] == ["GPU 2: power_watts cannot be read: GPU is lost"]


def test_xid_errors_are_events_of_one_gpu() -> None:
    nvml = FakeNvml()
    reader = GpuReader(nvml, {})
    assert reader.xid_events() == []
    nvml.events.extend([(4, 79), (1, 63)])
    assert reader.xid_events() == [(4, 79), (1, 63)]
    assert reader.xid_events() == []
    assert GpuReader(FakeNvml(unsupported=("events",)), {}).xid_events() is None


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("", 8), ("5", 8), ("1,6", 2), ("GPU-00000001,GPU-00000006-0000", 2), ("1,7,3", 3)],
)
def test_several_visible_devices_limit_the_gpus(visible: str, expected: int) -> None:
    indices = GpuReader(FakeNvml(), {"CUDA_VISIBLE_DEVICES": visible}).indices
    assert len(indices) == expected
    assert 1 in indices


def test_without_a_gpu_nothing_is_read() -> None:
    assert open_gpus(0) is None

"""grpo_mega.observe.hardware.sampler: samples of a step on a fake node of eight GPUs, one of them throttled."""

from __future__ import annotations

import time

import pytest

from grpo_mega.observe.hardware.gpu import GpuReader
from grpo_mega.observe.hardware.host import NodeReader
from grpo_mega.observe.hardware.sampler import NodeSampler
from tests.helpers.fake_nvml import REAL, FakeNvml

NEVER = 3600.0


def sampler_of(nvml: FakeNvml | None, interval: float = NEVER) -> NodeSampler:
    return NodeSampler(None if nvml is None else GpuReader(nvml, {}), NodeReader(), interval)


def test_counters_give_the_increase_of_a_step_and_gauges_their_mean() -> None:
    nvml = FakeNvml()
    sampler = sampler_of(nvml)
    sampler.take()
    for gpu in nvml.gpus:
        gpu.energy, gpu.link_kib, gpu.clock = 1_000_000 * (gpu.index + 1), 100, 1500
    first = sampler.take()
    nvml.gpus[2].energy += 400_000
    nvml.gpus[7].reasons = REAL.nvmlClocksEventReasonHwThermalSlowdown
    second = sampler.take()
    sampler.close()
    assert first is not None
    assert second is not None
    assert first.gpus["energy_joules"] == [1000.0 * (i + 1) for i in range(8)]
    assert first.gpus["nvlink_received_bytes"] == [200 * 1024.0] * 8
    assert first.gpus["sm_clock_mhz"] == [1500.0] * 8
    assert second.gpus["energy_joules"] == [0, 0, 400.0, 0, 0, 0, 0, 0]
    assert second.gpus["throttled_fraction"] == [0, 0, 0, 0, 0, 0, 0, 1]
    assert nvml.calls[-1] == "nvmlShutdown"


def test_xid_errors_count_in_their_step_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml()
    sampler = sampler_of(nvml)
    nvml.events.append((6, 79))
    first, second = sampler.take(), sampler.take()
    sampler.close()
    assert first is not None
    assert second is not None
    assert first.gpus["xid_events"] == [0, 0, 0, 0, 0, 0, 1, 0]
    assert second.gpus["xid_events"] == [0] * 8
    assert "GPU 6 reports Xid error 79" in caplog.text


def test_a_counter_that_was_set_back_has_no_increase() -> None:
    nvml = FakeNvml()
    nvml.gpus[0].energy = 5_000_000
    sampler = sampler_of(nvml)
    nvml.gpus[0].energy = 1_000_000
    found = sampler.take()
    sampler.close()
    assert found is not None
    assert found.gpus["energy_joules"][0] is None


def test_samples_are_taken_in_the_background() -> None:
    nvml = FakeNvml()
    sampler = sampler_of(nvml, interval=0.01)
    sampler.take()
    nvml.gpus[0].clock = 1000
    deadline, before = time.monotonic() + 10, nvml.calls.count("utilization")
    while nvml.calls.count("utilization") < before + 24 and time.monotonic() < deadline:
        time.sleep(0.01)
    nvml.gpus[0].clock = 1755
    found = sampler.take()
    sampler.close()
    assert found is not None
    clock = found.gpus["sm_clock_mhz"][0]
    assert clock is not None
    assert 1000 < clock < 1755  # a mean of both


def test_a_failure_ends_the_sampling_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    class BrokenReader(NodeReader):
        def read(self) -> dict[str, float]:
            raise OSError("no such file")

    sampler = NodeSampler(None, BrokenReader(), NEVER)
    assert sampler.take() is None
    sampler.close()
    assert caplog.text.count("a sample failed") == 1


def test_a_node_without_gpus_has_the_values_of_its_host() -> None:
    sampler = sampler_of(None)
    found = sampler.take()
    sampler.close()
    assert found is not None
    assert found.gpus == {}
    assert "cpu_utilization" in found.host

"""grpo_mega.observe.hardware.host: values of this machine, compared with the kernel's own files."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest

from grpo_mega.observe.hardware.host import NodeReader, ProcessReader, disk_free_fraction, stalled_fraction

PSI = "some avg10=12.50 avg60=1.00 avg300=0.10 total=123\nfull avg10=7.00 avg60=0.50 avg300=0.00 total=45\n"


def kibibytes(name: str) -> float:
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith(f"{name}:"))
    return 1024.0 * int(line.split()[1])


def test_a_node_is_read_as_the_kernel_reports_it(tmp_path: Path) -> None:
    pressure = tmp_path / "memory"
    pressure.write_text(PSI)
    found = NodeReader(pressure).read()
    assert set(found) == {"cpu_utilization", "memory_available_fraction", "page_cache_bytes", "memory_pressure"}
    assert found["memory_pressure"] == 0.125
    assert found["memory_available_fraction"] == pytest.approx(
        kibibytes("MemAvailable") / kibibytes("MemTotal"), abs=0.1
    )
    assert found["page_cache_bytes"] == pytest.approx(kibibytes("Cached") + kibibytes("SReclaimable"), rel=0.3)
    assert 0 <= found["cpu_utilization"] <= 1
    assert "memory_pressure" not in NodeReader(tmp_path / "missing").read()


def test_pressure_of_some_tasks_is_read_as_a_fraction() -> None:
    assert stalled_fraction(PSI) == 0.125


def test_a_process_counts_its_own_files_and_memory() -> None:
    reader = ProcessReader()
    before = reader.read()
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(10)]
    try:
        after = reader.read()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert after["open_files"] - before["open_files"] == 10
    assert after["open_files_fraction"] == after["open_files"] / resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    status = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:"))
    assert after["rank_memory_bytes"] == pytest.approx(1024 * int(status.split()[1]), rel=0.05)
    assert after["page_reads"] >= 0


def test_the_free_part_of_a_disk() -> None:
    disk = shutil.disk_usage("/")
    assert disk_free_fraction(Path("/")) == pytest.approx(disk.free / disk.total, abs=0.01)

"""Rows of the table of metrics for machines and ranks: `gpu/*`, `host/*` of nodes and ranks, `rank/*`."""

from __future__ import annotations

from grpo_mega.observe.metric_row import HARDWARE, MEMORY, TIME, Metric

_RANKS = "with several ranks"
_GPUS = "on CUDA with nvidia-ml-py, where the GPU supports it"
_OVER_GPUS = "mean, min, max over GPUs, and node and GPU farthest from the median"
_OVER_NODES = "mean, min, max over nodes, and the node farthest from the median"
_OVER_RANKS = "mean, min, max over ranks, and the rank farthest from the median"
_GPU = {  # name -> chart, unit, meaning
    "utilization": ("utilization", "fraction", "time in which a kernel ran"),
    "memory_used_bytes": ("GPU memory", "bytes", "largest memory in use, of all processes"),
    "power_watts": ("power", "watts", "mean power"),
    "energy_joules": ("energy", "joules", "energy of the step"),
    "temperature_celsius": ("temperature", "degrees Celsius", "highest temperature"),
    "sm_clock_mhz": ("clocks", "MHz", "mean clock of the multiprocessors"),
    "memory_clock_mhz": ("memory clock", "MHz", "mean clock of the memory"),
    "throttled_fraction": (
        "throttling",
        "fraction",
        "samples in which heat, the power brake or a fault slowed the clocks",
    ),
    "power_capped_fraction": ("power cap", "fraction", "samples in which the power limit slowed the clocks"),
    "nvlink_sent_bytes": ("NVLink", "bytes", "data sent over all NVLinks in the step"),
    "nvlink_received_bytes": ("NVLink", "bytes", "data received over all NVLinks in the step"),
    "pcie_sent_bytes_per_second": ("PCIe", "bytes / s", "data sent over PCIe, in samples of 20 ms"),
    "pcie_received_bytes_per_second": ("PCIe", "bytes / s", "data received over PCIe, in samples of 20 ms"),
    "ecc_corrected": ("ECC errors", "errors", "memory errors of the step that were corrected"),
    "ecc_uncorrected": ("ECC errors", "errors", "memory errors of the step that were not corrected"),
    "xid_events": ("Xid errors", "errors", "critical errors that the driver reported in the step; see the log"),
}

MACHINE_METRICS: dict[str, Metric] = {
    **{
        f"gpu/{name}_*": Metric(HARDWARE, chart, unit, f"{meaning}; {_OVER_GPUS}", _GPUS)
        for name, (chart, unit, meaning) in _GPU.items()
    },
    "host/cpu_utilization_*": Metric(HARDWARE, "utilization", "fraction", f"busy CPU time of a node; {_OVER_NODES}"),
    "host/memory_available_fraction_*": Metric(
        HARDWARE, "host memory", "fraction", f"part of a node's memory that programs can still get; {_OVER_NODES}"
    ),
    "host/page_cache_bytes_*": Metric(HARDWARE, "page cache", "bytes", f"files that a node caches; {_OVER_NODES}"),
    "host/memory_pressure_*": Metric(
        HARDWARE,
        "memory pressure",
        "fraction",
        f"time of 10 s in which a program waited for memory or for a page that had left the cache; {_OVER_NODES}",
        "where the kernel has /proc/pressure/memory",
    ),
    "host/page_reads_*": Metric(
        HARDWARE, "page reads", "pages", f"pages of files or swap that a rank's process read from disk; {_OVER_RANKS}"
    ),
    "host/open_files_fraction_*": Metric(
        HARDWARE, "open files", "fraction", f"open files of a rank's process / limit of the system; {_OVER_RANKS}"
    ),
    "host/open_files_*": Metric(HARDWARE, "number of open files", "files", f"of a rank's process; {_OVER_RANKS}"),
    "host/rank_memory_bytes_*": Metric(
        MEMORY, "memory of a rank", "bytes", f"resident memory of a rank's process; {_OVER_RANKS}"
    ),
    "rank/*_seconds_*": Metric(
        TIME, "phase by rank", "seconds", f"seconds of one phase, waits included; {_OVER_RANKS}", _RANKS
    ),
    "rank/slowest": Metric(
        TIME,
        "slowest rank",
        "rank",
        "rank with the most seconds of its own work: sampling, and passes of the policy",
        _RANKS,
    ),
    "rank/slowest_seconds": Metric(TIME, "work of the slowest rank", "seconds", "seconds of this work", _RANKS),
    "rank/slowest_ratio": Metric(
        TIME, "slowest rank against the others", "1", "seconds of this work / median of the other ranks", _RANKS
    ),
}
"""Name, or shell pattern, of a metric -> its description."""

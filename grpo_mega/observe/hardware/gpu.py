"""Reads the state of a node's GPUs through NVML (the module pynvml of nvidia-ml-py).

A quantity that a GPU does not support is left out from then on, with one log line. Other errors of NVML leave out the
value of that GPU, also with one log line per GPU and quantity. Nothing here creates a CUDA context.
Asserted by tests/unit/observe/hardware/test_gpu.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

log = logging.getLogger(__name__)

_KIB = 1024
_ALL_LINKS = 0xFFFFFFFF  # scope of a field value: the sum over all NVLinks of the GPU
# Raised when the GPU, the driver or the user's rights do not have a quantity: it will not appear later in the run.
_UNSUPPORTED = ("NVML_ERROR_NOT_SUPPORTED", "NVML_ERROR_FUNCTION_NOT_FOUND", "NVML_ERROR_NO_PERMISSION")

Combination = Literal["mean", "max", "increase"]


@dataclass(frozen=True)
class GpuQuantity:
    """One value of a GPU.

    Attributes:
        read: (pynvml, handle) -> value in the unit of the metric.
        over_step: how the samples of a step are combined; `increase` is last minus first, for a counter.
    """

    read: Callable[[Any, Any], float]
    over_step: Combination = "mean"


def _field(nvml: Any, handle: Any, field: int) -> float:
    value = nvml.nvmlDeviceGetFieldValues(handle, [(field, _ALL_LINKS)])[0]
    if value.nvmlReturn != nvml.NVML_SUCCESS:
        raise nvml.NVMLError(value.nvmlReturn)
    return float(value.value.ullVal)


def _throttle_reasons(nvml: Any, handle: Any) -> int:
    return int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))


def _is_throttled(nvml: Any, handle: Any) -> float:
    """Return 1 if heat, the power brake or another fault of the machine slows the clocks.

    The power cap is not a fault: a GPU under full load often reaches it.
    """
    faults = (
        nvml.nvmlClocksEventReasonHwSlowdown
        | nvml.nvmlClocksEventReasonSwThermalSlowdown
        | nvml.nvmlClocksEventReasonHwThermalSlowdown
        | nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
    )
    return float(bool(_throttle_reasons(nvml, handle) & faults))


def _ecc_errors(nvml: Any, handle: Any, kind: int) -> float:
    return float(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC))


QUANTITIES: Mapping[str, GpuQuantity] = {
    "utilization": GpuQuantity(lambda n, h: n.nvmlDeviceGetUtilizationRates(h).gpu / 100),
    "memory_used_bytes": GpuQuantity(lambda n, h: float(n.nvmlDeviceGetMemoryInfo(h).used), "max"),
    "power_watts": GpuQuantity(lambda n, h: n.nvmlDeviceGetPowerUsage(h) / 1000),
    "energy_joules": GpuQuantity(lambda n, h: n.nvmlDeviceGetTotalEnergyConsumption(h) / 1000, "increase"),
    "temperature_celsius": GpuQuantity(
        lambda n, h: float(n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)), "max"
    ),
    "sm_clock_mhz": GpuQuantity(lambda n, h: float(n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM))),
    "memory_clock_mhz": GpuQuantity(lambda n, h: float(n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM))),
    "throttled_fraction": GpuQuantity(_is_throttled),
    "power_capped_fraction": GpuQuantity(
        lambda n, h: float(bool(_throttle_reasons(n, h) & n.nvmlClocksEventReasonSwPowerCap))
    ),
    "nvlink_sent_bytes": GpuQuantity(
        lambda n, h: _KIB * _field(n, h, n.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX), "increase"
    ),
    "nvlink_received_bytes": GpuQuantity(
        lambda n, h: _KIB * _field(n, h, n.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX), "increase"
    ),
    "pcie_sent_bytes_per_second": GpuQuantity(  # NVML measures 20 ms for each of these two
        lambda n, h: 1000.0 * n.nvmlDeviceGetPcieThroughput(h, n.NVML_PCIE_UTIL_TX_BYTES)
    ),
    "pcie_received_bytes_per_second": GpuQuantity(
        lambda n, h: 1000.0 * n.nvmlDeviceGetPcieThroughput(h, n.NVML_PCIE_UTIL_RX_BYTES)
    ),
    "ecc_corrected": GpuQuantity(lambda n, h: _ecc_errors(n, h, n.NVML_MEMORY_ERROR_TYPE_CORRECTED), "increase"),
    "ecc_uncorrected": GpuQuantity(lambda n, h: _ecc_errors(n, h, n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED), "increase"),
}
"""Name -> how the value is read. The metric is gpu/NAME_mean, _min, _max, and the GPU farthest from the median."""

XID = "xid_events"
"""Name of the number of Xid errors, which come as events and not as a value."""


class GpuReader:
    """Reads all quantities of the GPUs of this node.

    Args:
        nvml: the module pynvml.
        environment: CUDA_VISIBLE_DEVICES limits the GPUs if it names more than one; a single one is only this task's.

    Raises:
        pynvml.NVMLError: NVML cannot be initialized.
    """

    def __init__(self, nvml: Any, environment: Mapping[str, str] = os.environ) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        handles = {i: nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())}
        self._handles = {i: h for i, h in handles.items() if i in self._visible(handles, environment)}
        self._unsupported: set[str] = set()
        self._reported: set[tuple[int, str]] = set()
        self._events = self._register_events()

    @property
    def indices(self) -> tuple[int, ...]:
        """NVML's indices of the GPUs, in the order of the values of `read`."""
        return tuple(self._handles)

    def read(self) -> dict[str, list[float | None]]:
        """Return the value of every supported quantity on each GPU; None where a GPU failed to give it."""
        found = {}
        for name, quantity in QUANTITIES.items():
            if name not in self._unsupported:
                values = [self._value(i, handle, name, quantity) for i, handle in self._handles.items()]
                if name not in self._unsupported:
                    found[name] = values
        return found

    def xid_events(self) -> list[tuple[int, int]] | None:
        """Return (index of the GPU, Xid number) of the errors since the last call; None: events are not supported."""
        nvml, found = self._nvml, list[tuple[int, int]]()
        if self._events is None:
            return None
        while True:
            try:
                data = nvml.nvmlEventSetWait_v2(self._events, 0)
            except nvml.NVMLError as error:
                if error.value != nvml.NVML_ERROR_TIMEOUT:  # a timeout means that there is no event
                    log.warning("GPU Xid errors are no longer reported: %s", error)
                    self._events = None
                return found
            found.append((nvml.nvmlDeviceGetIndex(data.device), int(data.eventData)))

    def close(self) -> None:
        """Release NVML."""
        if self._events is not None:
            self._nvml.nvmlEventSetFree(self._events)
        self._nvml.nvmlShutdown()

    def _visible(self, handles: Mapping[int, Any], environment: Mapping[str, str]) -> set[int]:
        named = [part.strip() for part in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
        if len(named) < 2:
            return set(handles)
        uuids = {i: str(self._nvml.nvmlDeviceGetUUID(handle)) for i, handle in handles.items()}
        return {i for i in handles if str(i) in named or any(uuids[i].startswith(n) for n in named if "-" in n)}

    def _value(self, index: int, handle: Any, name: str, quantity: GpuQuantity) -> float | None:
        nvml = self._nvml
        try:
            return quantity.read(nvml, handle)
        except nvml.NVMLError as error:
            if error.value in {getattr(nvml, code) for code in _UNSUPPORTED}:
                self._leave_out(name, error)
            elif (index, name) not in self._reported:
                self._reported.add((index, name))
                log.warning("GPU %d: %s cannot be read: %s", index, name, error)
            return None

    def _leave_out(self, name: str, reason: object) -> None:
        if name not in self._unsupported:
            self._unsupported.add(name)
            log.info("gpu/%s_* is left out: NVML answers %r on this machine", name, str(reason))

    def _register_events(self) -> Any | None:
        nvml = self._nvml
        try:
            events = nvml.nvmlEventSetCreate()
            for handle in self._handles.values():
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError as error:
            self._leave_out(XID, error)
            return None
        return events


def open_gpus(num_devices: int) -> GpuReader | None:
    """Return the reader of this node's GPUs, or None without GPUs or without NVML, which a warning reports.

    Args:
        num_devices: GPUs that torch sees in this process.
    """
    if num_devices == 0:
        return None
    try:
        import pynvml
    except ImportError:
        log.warning("the metrics gpu/* are left out: pynvml is not installed; pip install nvidia-ml-py")
        return None
    try:
        return GpuReader(pynvml)
    except pynvml.NVMLError as error:
        log.warning("the metrics gpu/* are left out: NVML cannot be initialized (%s); check nvidia-smi", error)
        return None

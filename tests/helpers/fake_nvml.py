"""A fake of the module pynvml: eight GPUs, with the constants and error classes of the real module."""

from __future__ import annotations

import importlib.util
import sys
from collections import deque
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any


def real_pynvml() -> ModuleType:
    """Return nvidia-ml-py's module, or the copy that vLLM ships; neither loads the driver's library."""
    if (found := importlib.util.find_spec("pynvml")) is None:
        vllm = importlib.util.find_spec("vllm")
        assert vllm is not None
        assert vllm.submodule_search_locations
        path = f"{vllm.submodule_search_locations[0]}/third_party/pynvml.py"
        found = importlib.util.spec_from_file_location("pynvml_of_vllm", path)
    assert found is not None
    assert found.loader is not None
    if found.name in sys.modules:
        return sys.modules[found.name]
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


REAL = real_pynvml()


@dataclass
class FakeGpu:
    index: int
    clock: int = 1755  # MHz
    reasons: int = 0
    energy: int = 0  # mJ
    link_kib: int = 0
    ecc: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})
    failing: dict[str, int] = field(default_factory=dict)
    """Name of a function of NVML -> code of the error that it raises for this GPU."""


class FakeNvml:
    """Functions of NVML; everything else is the real module's."""

    def __init__(self, num_gpus: int = 8, unsupported: tuple[str, ...] = ()) -> None:
        self.gpus = [FakeGpu(i) for i in range(num_gpus)]
        self.unsupported = unsupported
        self.events: deque[tuple[int, int]] = deque()
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvml") and callable(getattr(REAL, name)):
            raise AssertionError(f"the fake has no function {name}")
        return getattr(REAL, name)

    def check(self, function: str, gpu: FakeGpu) -> None:
        self.calls.append(function)
        if function in self.unsupported:
            raise REAL.NVMLError(REAL.NVML_ERROR_NOT_SUPPORTED)
        if function in gpu.failing:
            raise REAL.NVMLError(gpu.failing[function])

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names, here and below
        self.calls.append("nvmlInit")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.calls.append("nvmlShutdown")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        return self.gpus[index]

    def nvmlDeviceGetIndex(self, gpu: FakeGpu) -> int:  # noqa: N802
        return gpu.index

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:  # noqa: N802
        return f"GPU-{gpu.index:08d}-0000"

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> Any:  # noqa: N802
        self.check("utilization", gpu)
        return SimpleNamespace(gpu=90, memory=40)

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> Any:  # noqa: N802
        self.check("memory", gpu)
        return SimpleNamespace(total=80 * 2**30, used=(60 + gpu.index) * 2**30)

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGpu) -> int:  # noqa: N802
        self.check("power", gpu)
        return 650_000

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: FakeGpu) -> int:  # noqa: N802
        self.check("energy", gpu)
        return gpu.energy

    def nvmlDeviceGetTemperature(self, gpu: FakeGpu, sensor: int) -> int:  # noqa: N802
        self.check("temperature", gpu)
        assert sensor == REAL.NVML_TEMPERATURE_GPU
        return 60 + gpu.index

    def nvmlDeviceGetClockInfo(self, gpu: FakeGpu, kind: int) -> int:  # noqa: N802
        self.check("clock", gpu)
        return {REAL.NVML_CLOCK_SM: gpu.clock, REAL.NVML_CLOCK_MEM: 2619}[kind]

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: FakeGpu) -> int:  # noqa: N802
        self.check("reasons", gpu)
        return gpu.reasons

    def nvmlDeviceGetFieldValues(self, gpu: FakeGpu, fields: list[tuple[int, int]]) -> list[Any]:  # noqa: N802
        self.check("fields", gpu)
        ((field_id, scope),) = fields
        assert scope == 0xFFFFFFFF
        sent = {REAL.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX: 1, REAL.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX: 2}[field_id]
        code = REAL.NVML_ERROR_NOT_SUPPORTED if "nvlink" in self.unsupported else REAL.NVML_SUCCESS
        return [SimpleNamespace(nvmlReturn=code, value=SimpleNamespace(ullVal=sent * gpu.link_kib))]

    def nvmlDeviceGetPcieThroughput(self, gpu: FakeGpu, counter: int) -> int:  # noqa: N802
        self.check("pcie", gpu)
        return {REAL.NVML_PCIE_UTIL_TX_BYTES: 3000, REAL.NVML_PCIE_UTIL_RX_BYTES: 5000}[counter]

    def nvmlDeviceGetTotalEccErrors(self, gpu: FakeGpu, kind: int, counter: int) -> int:  # noqa: N802
        self.check("ecc", gpu)
        assert counter == REAL.NVML_VOLATILE_ECC
        return gpu.ecc[kind]

    def nvmlEventSetCreate(self) -> object:  # noqa: N802
        return self.events

    def nvmlEventSetFree(self, events: object) -> None:  # noqa: N802
        assert events is self.events

    def nvmlDeviceRegisterEvents(self, gpu: FakeGpu, kinds: int, events: object) -> None:  # noqa: N802
        self.check("events", gpu)
        assert (kinds, events) == (REAL.nvmlEventTypeXidCriticalError, self.events)

    def nvmlEventSetWait_v2(self, events: object, timeout: int) -> Any:  # noqa: N802
        assert timeout == 0, "the sampler must not wait"
        if not self.events:
            raise REAL.NVMLError(REAL.NVML_ERROR_TIMEOUT)
        gpu, xid = self.events.popleft()
        return SimpleNamespace(device=self.gpus[gpu], eventData=xid)

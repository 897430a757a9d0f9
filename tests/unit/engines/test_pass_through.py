"""`engine.args`: what the installed classes of vLLM and SGLang accept, and each error."""

from __future__ import annotations

import importlib.util
import logging
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch

from grpo_mega.config.load import load_config, resolved
from grpo_mega.doctor.model_rules import check_model
from grpo_mega.engines import pass_through
from grpo_mega.engines.pass_through import check_engine_args, installed_fields, installed_limits, owned_fields
from grpo_mega.engines.sglang import arguments as sglang_arguments
from grpo_mega.engines.vllm import arguments as vllm_arguments
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError
from tests.helpers.family_configs import raw_family_config
from tests.helpers.jobs import REPOSITORY
from tests.helpers.one_process import run

QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
KINDS = ("vllm", "sglang")
GPU = sglang_arguments.GpuMemory(75 * 2**30, 80 * 2**30, workspace=0)


def fields_of(kind: str) -> dict[str, Any]:
    fields = installed_fields(kind)
    if fields is None:
        pytest.skip(f"{kind} is not installed here")
    return fields


def check(kind: str, **args: Any) -> None:
    config = load_config(QUICKSTART, [f"engine.kind={kind}", f"engine.args={args}"])
    assert resolved(config)["engine"]["args"] == args
    check_model(config, Topology(1))


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("vllm", {"disable_cascade_attn": True, "performance_mode": "throughput"}),
        ("vllm", {"max_logprobs": -1, "watermark": 0.5, "cudagraph_capture_sizes": [1, 2]}),
        ("sglang", {"schedule_policy": "lpm"}),
        ("sglang", {"expert_distribution_recorder_buffer_size": -1, "mamba_max_states_per_path": -1}),
    ],
)
def test_arguments_with_the_type_that_the_engine_declares_are_accepted(kind: str, args: dict[str, Any]) -> None:
    fields_of(kind)
    check(kind, **args)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        ("vllm", {"disable_cascade_atn": True}, ["vLLM's EngineArgs", "did you mean disable_cascade_attn?"]),
        ("vllm", {"disable_cascade_attn": "yes"}, ["engine.args.disable_cascade_attn='yes'", "bool"]),
        ("vllm", {"performance_mode": "fast"}, ["engine.args.performance_mode='fast'", "'throughput'"]),
        ("vllm", {"seed": 3}, ["engine.args.seed=3", "set run.seed"]),
        ("vllm", {"block_size": 16}, ["engine.args.block_size=16", "remove engine.args.block_size"]),
        ("vllm", {"gpu_memory_utilization": 0.5}, ["set engine.memory_share"]),
        ("vllm", {"enable_nccl_comm_suspend": False}, ["remove engine.args.enable_nccl_comm_suspend"]),
        ("vllm", {"max_model_length": 64}, ["did you mean max_model_len?", "sampling.max_tokens sets it"]),
        ("vllm", {"watermark": 1.0}, ["engine.args.watermark=1.0 must be at least 0 and less than 1"]),
        ("vllm", {"max_logprobs": -2}, ["engine.args.max_logprobs=-2 must be at least -1"]),
        ("vllm", {"max_num_scheduled_tokens": 0}, ["max_num_scheduled_tokens=0 must be at least 1"]),
        (
            "vllm",
            {"cudagraph_capture_sizes": [8, -8]},
            ["engine.args.cudagraph_capture_sizes=[8, -8] must be at least"],
        ),
        ("sglang", {"tokenizer_worker_num": -1}, ["engine.args.tokenizer_worker_num=-1 must be at least 0"]),
        (
            "sglang",
            {"schedule_policy": "fast"},
            ["engine.args.schedule_policy='fast' must be one of lpm, random, fcfs"],
        ),
        ("sglang", {"sampling_backnd": "x"}, ["did you mean sampling_backend? The program sets it itself"]),
        ("sglang", {"schedule_polcy": "lpm"}, ["SGLang's ServerArgs", "did you mean schedule_policy?"]),
        ("sglang", {"schedule_policy": 3}, ["engine.args.schedule_policy=3", "string"]),
        ("sglang", {"context_length": 64}, ["set data.max_prompt_tokens and sampling.max_tokens"]),
    ],
)
def test_an_argument_that_is_rejected_names_the_key_the_value_and_the_remedy(
    kind: str, args: dict[str, Any], words: list[str]
) -> None:
    fields_of(kind)
    with pytest.raises(UserError) as raised:
        check(kind, **args)
    assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)


def test_without_the_package_owned_fields_are_rejected_and_a_warning_says_what_was_not_checked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with mock.patch.object(importlib.util, "find_spec", return_value=None), caplog.at_level(logging.WARNING):
        check_engine_args(load_config(QUICKSTART, ["engine.args={anything: 1}"]))
        assert "vLLM's EngineArgs: the package is not installed here" in caplog.text
        with pytest.raises(UserError, match=r"engine\.args\.seed=3: .* set run\.seed"):
            check_engine_args(load_config(QUICKSTART, ["engine.args={seed: 3}"]))


@pytest.mark.parametrize("on_cuda", [False, True])
def test_every_argument_that_the_program_sets_is_owned_and_exists(on_cuda: bool) -> None:
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    with mock.patch.object(torch.cuda, "is_available", return_value=on_cuda), mock.patch.dict(os.environ):
        for family in ("qwen3", "deepseek_v3"):
            spec = spec_from_config(raw_family_config(family), "config.json")
            for fp8, tokens in ((False, None), (on_cuda, 4096)):
                settings = vllm_arguments.VllmSettings(Path(), "bf16", 1, 96, 8, tokens, 0, fp8=fp8)
                found["vllm"] |= vllm_arguments.engine_arguments(settings, spec).keys()
    for tokens in (None, 4096):
        of_sglang = sglang_arguments.SglangSettings(Path(), "bf16", 1, 96, 8, tokens, 0)
        found["sglang"] |= sglang_arguments.engine_arguments(of_sglang, GPU if on_cuda else None, 1).keys()
    for kind in KINDS:
        owned, fields = owned_fields(kind, on_cuda=on_cuda), fields_of(kind)
        assert found[kind] - owned.keys() == set()
        assert owned.keys() - fields.keys() == set()


def test_settings_hand_the_arguments_to_the_engine() -> None:
    spec = spec_from_config(raw_family_config("qwen3"), "config.json")
    config = load_config(QUICKSTART, ["engine.args={disable_cascade_attn: true}"])
    arguments = vllm_arguments.engine_arguments(vllm_arguments.VllmSettings.from_config(config, Path()), spec)
    assert arguments["disable_cascade_attn"] is True
    config = load_config(QUICKSTART, ["engine.kind=sglang", "engine.args={schedule_policy: lpm}"])
    settings = sglang_arguments.SglangSettings.from_config(config, Path())
    assert sglang_arguments.engine_arguments(settings, None, 1)["schedule_policy"] == "lpm"


def imported_types() -> dict[str, Any]:
    """The same fields as vLLM has them once it is imported; in a process of its own."""
    from vllm.engine.arg_utils import EngineArgs

    from grpo_mega.config.pass_through import dataclass_types

    return {name: str(each) for name, each in dataclass_types(EngineArgs).items() if name[0] != "_"}


def test_fields_read_from_the_source_of_vllm_are_those_of_the_imported_class(recorder: ProcessPoolExecutor) -> None:
    read, imported = fields_of("vllm"), run(recorder, imported_types)
    assert read.keys() == imported.keys()
    known = [name for name, each in read.items() if each is not Any and not get_args(each)]
    assert len(known) > 100
    assert [name for name in known if str(read[name]) != imported[name]] == []


def test_limits_come_from_the_source_of_either_package() -> None:
    for kind, least in (("vllm", 40), ("sglang", 100)):
        fields = fields_of(kind)
        limits = {name: limit for name, limit in installed_limits(kind).items() if name in fields}
        assert len(limits) > least
    assert installed_limits("sglang")["mamba_backend"].choices == ("triton", "flashinfer")
    assert installed_limits("sglang")["moe_runner_backend"].choices[0] == "auto"  # a list in a module of its own


def defaults_outside_of_their_limits() -> list[str]:
    """Return the fields of vLLM whose default is outside of the limit; in a process of its own."""
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    limits = installed_limits("vllm")
    return [each.name for each in fields(EngineArgs) if each.name in limits and limits[each.name].rule(each.default)]


def test_no_default_of_vllm_is_outside_of_its_limit(recorder: ProcessPoolExecutor) -> None:
    fields_of("vllm")
    assert run(recorder, defaults_outside_of_their_limits) == []


def test_most_types_of_either_package_are_known() -> None:
    for kind in KINDS:
        fields = fields_of(kind)
        assert sum(each is Any for each in fields.values()) < 0.15 * len(fields), kind
    assert pass_through.installed_fields("vllm") is not None

"""What is refused before SGLang is started, and how its ends of rollouts are understood. No SGLang."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from grpo_mega.engines import sglang_cpu
from grpo_mega.engines.sglang_engine import cached_tokens, check_sglang, stop_reason
from grpo_mega.types import UserError


def test_a_missing_sglang_names_the_command_that_adds_it() -> None:
    with (
        mock.patch.object(importlib.util, "find_spec", return_value=None),
        pytest.raises(UserError, match=r"engine\.kind=sglang needs the package .* run launch/setup\.sh --with sglang"),
    ):
        check_sglang()


def test_a_machine_with_cuda_is_refused() -> None:
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        pytest.raises(UserError, match=r"engine\.kind=sglang runs on machines without CUDA so far; use"),
    ):
        check_sglang()


def test_kv_cache_tokens_must_hold_a_rollout() -> None:
    assert cached_tokens(None, 48, 96) == 48 * 104
    assert cached_tokens(104, 48, 96) == 104
    with pytest.raises(UserError, match=r"engine\.kv_cache_tokens=103 does not hold.*96 tokens.*; use at least 104"):
        cached_tokens(103, 48, 96)


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        ({"type": "length", "length": 8}, "length"),
        ({"type": "stop", "matched": 1}, "eos"),
        ({"type": "stop", "matched": "="}, "stop"),
    ],
)
def test_ends_of_rollouts(finish: dict[str, Any], expected: str) -> None:
    assert stop_reason(finish) == expected


def test_a_rollout_that_sglang_gave_up_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"SGLang ended a rollout early: .*out of memory"):
        stop_reason({"type": "abort", "message": "out of memory"})


def test_stand_ins_can_be_imported_called_as_decorators_and_are_hidden_from_probes() -> None:
    """In modules that are thrown away afterwards."""
    with mock.patch.dict(sys.modules), mock.patch.object(sys, "meta_path", list(sys.meta_path)):
        sglang_cpu.install_stand_ins()
        importlib.import_module("triton.language.extra")
        triton = importlib.import_module("triton")
        assert triton.jit(len) is len
        assert triton.autotune(configs=[], key=[])(len) is len
        assert isinstance(triton.Config({}), triton.Config)
        kernels = importlib.import_module("sgl_kernel.elementwise")
        with pytest.raises(NotImplementedError, match=r"sgl_kernel\.elementwise\.rmsnorm is not there without CUDA"):
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

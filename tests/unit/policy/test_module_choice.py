"""Which modules compute the policy, for every value of the key, device and installation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.policy.module_choice import (
    INSTALL_TRANSFORMER_ENGINE,
    LOCAL_ON_META,
    TRANSFORMER_ENGINE,
    ModuleChoice,
    Version,
    check_attention,
    choose_modules,
)
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names
from tests.helpers.family_configs import raw_family_config
from tests.helpers.transformer_engine_sources import pinned_release

QUICKSTART = Path(__file__).resolve().parents[3] / "configs" / "quickstart.yaml"
FP8 = ("precision.dtype=bf16", "precision.fp8.recipe=blockwise")


def choose(*overrides: str, on_cuda: bool, release: str | None) -> ModuleChoice:
    config = load_config(QUICKSTART, list(overrides))
    return choose_modules(config, on_cuda=on_cuda, version=versions(release))


def versions(release: str | None, cudnn: str | None = None) -> Version:
    return {"transformer-engine": release, "nvidia-cudnn-cu13": cudnn}.get


def rejection(*overrides: str, on_cuda: bool, release: str | None) -> UserError:
    with pytest.raises(UserError) as caught:
        choose(*overrides, on_cuda=on_cuda, release=release)
    return caught.value


@pytest.mark.parametrize(
    ("modules", "on_cuda", "release", "transformer_engine"),
    [
        ("auto", False, None, False),
        ("auto", False, "2.20.2", False),
        ("auto", True, None, False),
        ("auto", True, "2.20.2", True),
        ("transformer_engine", True, "2.20.2", True),
        ("local", False, None, False),
        ("local", True, None, False),
        ("local", True, "2.20.2", False),
    ],
)
def test_the_modules_follow_the_key_the_device_and_what_is_installed(
    modules: str, on_cuda: bool, release: str | None, transformer_engine: bool
) -> None:
    found = choose(f"policy.modules={modules}", on_cuda=on_cuda, release=release)
    assert found == ModuleChoice(transformer_engine, "cuda" if on_cuda else "cpu")


@pytest.mark.parametrize("overrides", [("policy.modules=transformer_engine",), FP8])
def test_transformer_engine_that_is_not_installed_is_rejected_with_its_pinned_command(overrides: tuple[str]) -> None:
    error = rejection(*overrides, on_cuda=True, release=None)
    assert_names(error.message, overrides[-1], "not installed")
    assert error.remedy == INSTALL_TRANSFORMER_ENGINE
    assert f"[core_cu13,pytorch]=={pinned_release()}'" in error.remedy
    assert pinned_release() == TRANSFORMER_ENGINE


@pytest.mark.parametrize("overrides", [("policy.modules=transformer_engine",), FP8])
def test_transformer_engine_without_cuda_is_rejected(overrides: tuple[str]) -> None:
    error = rejection(*overrides, on_cuda=False, release="2.20.2")
    assert_names(error.message, overrides[-1], "CUDA")
    assert "policy.modules=auto or local" in (error.remedy or "")


def test_fp8_is_not_supported_with_local_modules() -> None:
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, ["policy.modules=local", *FP8])
    assert_names(caught.value.message, "precision.fp8.recipe=blockwise", "policy.modules=local")
    assert "policy.modules=auto" in (caught.value.remedy or "")


def test_an_unknown_kind_of_modules_is_rejected() -> None:
    with pytest.raises(UserError, match=r"policy\.modules"):
        load_config(QUICKSTART, ["policy.modules=apex"])


@pytest.mark.parametrize(
    ("choice", "on_default_device"),
    [
        (ModuleChoice(False, "cpu"), True),
        (ModuleChoice(False, "cuda"), False),
        (ModuleChoice(True, "cuda"), False),
        (ModuleChoice(True, "meta"), False),  # with use_cpu_initialization Transformer Engine would build on the CPU
        (LOCAL_ON_META, True),
    ],
)
def test_modules_are_built_where_they_compute(choice: ModuleChoice, on_default_device: bool) -> None:
    fields = choice.fields()
    assert fields["use_cpu_initialization"] is on_default_device
    assert fields["init_model_with_meta_device"] is (choice.device == "meta")
    assert choice.on_meta == ModuleChoice(choice.transformer_engine, "meta")


@pytest.mark.parametrize(
    ("family", "overrides", "release", "cudnn", "reason"),
    [
        ("gpt_oss", (), "2.20.2", "9.20.0.48", None),
        ("gpt_oss", (), "2.20.2", None, None),
        ("gpt_oss", (), "2.11.0", None, "older than 2.20.2"),
        ("gpt_oss", (), "2.20.2", "9.17.1.4", "nvidia-cudnn-cu13 9.17.1.4"),
        ("gpt_oss", ("parallel.cp=2",), "2.20.2", None, "cp_comm_type=a2a"),
        ("gpt_oss", ("parallel.cp=2", "parallel.megatron.cp_comm_type=a2a"), "2.20.2", None, None),
        ("gpt_oss", ("run.deterministic=true",), "2.20.2", None, "run.deterministic=true"),
        ("gpt_oss", ("run.deterministic=true", "parallel.cp=2", "policy.modules=local"), "2.11.0", None, None),
        ("llama", ("run.deterministic=true", "parallel.cp=2"), "2.11.0", None, None),
    ],
)
def test_attention_sinks_that_transformer_engine_cannot_train_are_rejected(
    family: str, overrides: tuple[str, ...], release: str, cudnn: str | None, reason: str | None
) -> None:
    spec = spec_from_config(raw_family_config(family), "config.json")
    version = versions(release, cudnn)
    arguments: dict[str, Any] = {"version": version}
    config = load_config(QUICKSTART, list(overrides))
    choice = choose_modules(config, on_cuda=True, **arguments)
    if reason is None:
        check_attention(spec, config, choice, **arguments)
        return
    with pytest.raises(UserError) as caught:
        check_attention(spec, config, choice, **arguments)
    assert_names(caught.value.message, "policy.modules=auto", reason)
    assert caught.value.remedy == "set policy.modules=local"

"""Layouts that keep the blocks of FP8 weights whole are accepted; others are rejected with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.doctor.model_rules import check_model
from grpo_mega.models.config_readers import read_spec, spec_from_config
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel import devices
from grpo_mega.parallel.topology import Topology
from grpo_mega.quantization.fp8_layout_rules import EngineGrid, check_fp8_layout
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names
from tests.helpers.family_configs import raw_family_config
from tests.helpers.fp8_models import FP8_MODELS, make_fp8_model
from tests.helpers.jobs import REPOSITORY

QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
DEEPSEEK = REPOSITORY / "configs" / "models" / "DeepSeek-V3"


ONE = EngineGrid(1)


def spec_of(family: str) -> ModelSpec:
    return spec_from_config(raw_family_config(family, **FP8_MODELS.get(family, {})), "config.json")


def layout_error(
    spec: ModelSpec, policy: dict[str, int], engine: EngineGrid = ONE, *, latent_split: bool = False
) -> str:
    layout = ParallelConfig(**policy)
    try:
        check_fp8_layout(spec, layout, engine, latent_split=latent_split, where="the model")
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("family", "policy", "message"),
    [
        ("qwen3", {"tp": 2}, ""),
        ("qwen3_moe", {"etp": 2}, ""),
        ("qwen3_moe", {"etp": 4}, "block of model.layers.0.mlp.experts.0.gate_proj.weight at [0, 0] a rank of the"),
        ("deepseek_v3", {"tp": 2}, ""),
        (
            "deepseek_v3",
            {"tp": 4},
            "block of model.layers.0.self_attn.kv_b_proj.weight at [128, 0] a rank",
        ),
    ],
)
def test_a_policy_that_splits_blocks_is_rejected_with_the_tensor(
    family: str, policy: dict[str, int], message: str
) -> None:
    found = layout_error(spec_of(family), policy)
    assert bool(found) == bool(message)
    assert message in found


def test_latent_projections_are_split_only_without_a_gpu() -> None:
    spec = spec_of("deepseek_v3")
    assert "kv_a_proj_with_mqa.weight at [0, 0]" in layout_error(spec, {"tp": 2}, latent_split=True)
    assert layout_error(spec, {"tp": 1}, latent_split=True) == layout_error(spec, {"tp": 2}) == ""


def test_deepseek_v3_fits_an_engine_of_at_most_sixteen_tensor_parallel_ranks() -> None:
    spec, policy = read_spec(DEEPSEEK), {"tp": 2, "ep": 16}
    assert (
        layout_error(spec, policy, EngineGrid(16, experts_spread=True))
        == layout_error(spec, policy, EngineGrid(16))
        == ""
    )
    assert layout_error(spec, policy, EngineGrid(8, 4, experts_spread=True)) == ""
    assert_names(layout_error(spec, policy, EngineGrid(32, experts_spread=True)), "feed-forward size", "576")
    error = layout_error(spec, policy, EngineGrid(8, 4))
    assert_names(error, "engine.fp8", "engine.tp=8", "engine.dp=4", "64", "128", "smaller engine.tp", "engine.ep=32")


def test_stacked_experts_are_rejected() -> None:
    assert_names(layout_error(spec_of("gpt_oss"), {}), "experts", "stacked", "biases")


# Configs


def message_of(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check_model(load_config(QUICKSTART, ["precision.dtype=bf16", *overrides]), Topology(1))
    return str(caught.value)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "DRIVER_FOLDER", Path("/"))  # any folder that exists


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ["engine.fp8=scales_fp32", "engine.kind=sglang"],
            ["engine.fp8=scales_fp32", "engine.kind=sglang", "engine.kind=vllm", "remove engine.fp8"],
        ),
        (
            ["engine.fp8=scales_power_of_two", "precision.dtype=fp32"],
            ["engine.fp8=scales_power_of_two", "precision.dtype=fp32", "precision.dtype=bf16", "remove engine.fp8"],
        ),
        (["engine.fp8=own_loader"], ["engine.fp8='own_loader'", "'scales_fp32'", "'scales_power_of_two'"]),
    ],
)
def test_incompatible_keys_are_rejected(overrides: list[str], named: list[str]) -> None:
    assert_names(message_of(*overrides), *named)


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="this machine has GPUs")
def test_the_error_without_cuda_has_the_key_and_the_remedy() -> None:
    assert_names(message_of("engine.fp8=scales_fp32"), "engine.fp8=scales_fp32", "CUDA", "remove engine.fp8")
    elsewhere = message_of("engine.fp8=scales_fp32", "engine.placement=server", "engine.urls=['localhost:7']")
    assert elsewhere.startswith("engine.fp8 with engine.tp=1: ")  # its server checks for devices


def test_with_gpus_the_layout_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch)
    words = ("engine.fp8", "engine.tp=1", "key-value heads", "64", "128", "leave engine.fp8 out")
    assert_names(message_of("engine.fp8=scales_fp32"), *words)


def test_an_fp8_checkpoint_is_accepted_if_the_engine_uses_fp8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_gpus(monkeypatch)
    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = make_fp8_model(tmp_path, "deepseek_v3", quantization_config=scheme)
    given = ["model.base=null", f"model.path={folder}", "precision.dtype=bf16"]
    check_model(load_config(QUICKSTART, [*given, "engine.fp8=scales_fp32"]), Topology(1))
    assert "has a quantization_config" in message_of(*given)

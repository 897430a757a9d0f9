"""The engine's share of a GPU: computed by hand, and one check for the planner, the doctor and the start of a job."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from grpo_mega.cli.plan import main as plan_main
from grpo_mega.config.load import load_config
from grpo_mega.engines.sglang.arguments import GpuMemory, SglangSettings, engine_workspace
from grpo_mega.engines.sglang.arguments import engine_arguments as sglang_arguments
from grpo_mega.engines.vllm.arguments import VllmSettings
from grpo_mega.engines.vllm.arguments import engine_arguments as vllm_arguments
from grpo_mega.models.engine_memory import GIB, EngineShare, check_memory_share, engine_weight_bytes
from grpo_mega.models.kv_cache_memory import kv_bytes_per_token
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names
from tests.helpers.planner_cases import config_of, memory_of, spec_of

REPOSITORY = Path(__file__).resolve().parents[3]
LLAMA = str(REPOSITORY / "configs" / "llama-3.3-70b-8n8g-tp8pp2-vllm.yaml")
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
ONE = Topology(1)


def test_the_share_is_weights_workspace_and_cache() -> None:
    # 64 + 64 tokens; 256 rollouts of a vocabulary of 21; prefill steps of 8192 tokens with hidden size 64
    share = EngineShare.of(config_of(engine={"memory_share": 0.5}), spec_of(), ONE, 10 * GIB)
    workspace = 2 * GIB + 8 * 256 * 21 + 6 * 8192 * 64 * 2
    weights = engine_weight_bytes(spec_of(), ONE, 2, spread=False)
    assert (share.limit, share.weights, share.workspace) == (5 * GIB, weights, workspace)
    assert share.kv_cache == 5 * GIB - weights - workspace
    assert memory_of(config_of(engine={"memory_share": 0.5}), spec_of(), 1).engine.kv_cache == pytest.approx(
        0.5 * 79.1 * GIB - weights - workspace
    )


def test_the_share_must_hold_one_rollout_and_not_a_byte_less() -> None:
    config, spec = config_of(), spec_of()
    share = EngineShare.of(config, spec, ONE, 10 * GIB)
    # 4 blocks of 32 tokens for 128 tokens, and the null block
    needed = share.weights + share.workspace + 5 * 32 * kv_bytes_per_token(spec, 1, 2)
    check_memory_share(config, spec, ONE, needed / 0.85 + 1)
    with pytest.raises(UserError) as raised:
        check_memory_share(config, spec, ONE, needed / 0.85 - 1)
    assert_names(raised.value, "engine.memory_share=0.85", "so 96 tokens fit", "128 tokens", "engine.memory_share=0.86")


def test_without_a_share_that_is_enough_the_remedy_is_more_ranks() -> None:
    with pytest.raises(UserError) as raised:
        check_memory_share(config_of(), spec_of(), ONE, 1 * GIB)
    assert_names(raised.value, "engine.memory_share=0.85", " 0 tokens fit", "over more ranks (engine.tp=1)")
    assert "use at least" not in str(raised.value)


def test_a_cache_in_tokens_is_not_limited_by_the_share() -> None:
    check_memory_share(config_of(engine={"kv_cache_tokens": 4096}), spec_of(), ONE, 1 * GIB)


@pytest.mark.parametrize("share", ["0", "-0.5", "1.01", ".nan", ".inf", "half", "'0.5'"])
def test_a_share_outside_of_its_range_is_rejected(share: str) -> None:
    with pytest.raises((UserError, ValidationError), match=r"engine\.memory_share"):
        load_config(QUICKSTART, [f"engine.memory_share={share}"])


def test_the_whole_gpu_is_a_valid_share() -> None:
    assert load_config(QUICKSTART, ["engine.memory_share=1.0"]).engine.memory_share == 1.0


def test_a_share_beside_a_cache_in_tokens_is_rejected() -> None:
    with pytest.raises(UserError, match=r"engine\.memory_share=0\.7 .*engine\.kv_cache_tokens=4096"):
        load_config(QUICKSTART, ["engine.memory_share=0.7", "engine.kv_cache_tokens=4096"])


def test_both_engines_get_the_share_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    overrides = ["engine.memory_share=0.7", "engine.kv_cache_tokens=null", "precision.dtype=bf16"]
    config = load_config(QUICKSTART, overrides)
    arguments = vllm_arguments(VllmSettings.from_config(config, Path("model")), spec_of())
    assert arguments["gpu_memory_utilization"] == 0.7
    assert (arguments["sleep_mode_offload_cudagraph"], arguments["enable_nccl_comm_suspend"]) == (True, True)
    settings = SglangSettings.from_config(load_config(QUICKSTART, [*overrides, "engine.kind=sglang"]), Path("model"))
    memory = GpuMemory(80 * GIB, 80 * GIB, engine_workspace(settings, spec_of()))
    planned: Any = EngineShare.of(config, spec_of(), ONE, 80 * GIB)
    assert sglang_arguments(settings, memory, 1)["mem_fraction_static"] * 80 * GIB == pytest.approx(
        planned.limit - planned.workspace, rel=1e-3
    )


def test_the_planner_rejects_a_share_without_room_for_a_rollout(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_main([LLAMA, "engine.memory_share=0.2"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: engine.memory_share=0.2")
    least = re.search(r"use at least engine\.memory_share=(0\.\d+)", errors)
    assert least is not None
    assert plan_main([LLAMA, f"engine.memory_share={least[1]}"]) == 0
    assert plan_main([LLAMA, "engine.memory_share=1.0"]) == 2  # the CUDA context needs some memory, too

"""vLLM's block-scaled FP8 models, built as on a GPU but without kernels: loading, writing, and rejected kernels."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.engines.vllm.regions import declare_regions
from grpo_mega.engines.vllm.sink import VllmSink
from grpo_mega.engines.weights.loader_recording import CannotRecordError
from grpo_mega.models.config_readers import read_spec
from grpo_mega.models.digest import slice_digest
from grpo_mega.quantization.fp8_layout_rules import EngineGrid, check_fp8_layout
from grpo_mega.types import UserError
from tests.helpers.fp8_models import (
    build_fp8,
    fp8_tensors_of,
    fp8_weights,
    make_fp8_model,
    record_fp8,
)
from tests.helpers.one_process import run

MODELS = [
    ("llama", 1, False),
    ("qwen2", 2, False),
    ("qwen3", 2, False),
    ("qwen3_moe", 2, False),
    ("qwen3_moe", 2, True),
    ("mixtral", 2, False),
    ("glm4_moe", 2, False),
    ("deepseek_v3", 1, False),
    ("deepseek_v3", 2, True),
]
every_model = pytest.mark.parametrize(("family", "tp", "spread"), MODELS)


@every_model
def test_the_loader_takes_exactly_the_fp8_values_and_scales_of_a_sync_and_all_other_tensors_unchanged(
    recorder: ProcessPoolExecutor, tmp_path: Path, family: str, tp: int, spread: bool
) -> None:
    folder = make_fp8_model(tmp_path, family)
    tensors = fp8_tensors_of(folder)
    records = run(recorder, record_fp8, folder, tp, list(range(tp)), spread)
    copies = [copy for record in records for copy in record.copies]
    assert {copy.hf.name for copy in copies} == set(tensors)
    for copy in copies:
        wanted = tensors[copy.hf.name][1]
        assert copy.dtype == wanted or "gate.weight" in copy.hf.name, copy.hf  # a router that computes in fp32


def test_copies_of_the_attention_hold_whole_fp8_tensors_and_share_experts(
    recorder: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """The shared expert is whole on each of two copies with one rank, each routed expert on one of them."""
    folder = make_fp8_model(tmp_path, "deepseek_v3")
    records = run(recorder, record_fp8, folder, 1, [0, 1], True, 2)
    times = Counter(copy.hf.name for record in records for copy in record.copies)
    assert set(times) == set(fp8_tensors_of(folder))
    for name, count in times.items():
        assert count == (1 if ".mlp.experts." in name else 2), name
    engine = EngineGrid(1, 2, experts_spread=True)
    check_fp8_layout(read_spec(folder), ParallelConfig(), engine, latent_split=False, where="the model")


def test_an_fp8_engine_splits_values_and_scales_alike(recorder: ProcessPoolExecutor, tmp_path: Path) -> None:
    records = run(recorder, record_fp8, make_fp8_model(tmp_path, "qwen3"), 2, [0, 1], False)
    down = "model.layers.0.mlp.down_proj.weight"
    places = {str(copy.hf) for record in records for copy in record.copies if copy.hf.name.startswith(down)}
    assert places == {
        f"{down}[0:256, 0:256]",
        f"{down}[0:256, 256:512]",
        f"{down}_scale_inv[0:2, 0:2]",
        f"{down}_scale_inv[0:2, 2:4]",
    }


def no_caches() -> None:
    """Do nothing: the model has no caches."""


def filled(folder: Path, tp: int, spread: bool) -> tuple[Any, VllmSink, dict[str, torch.Tensor]]:
    """Return the model of the last rank, its sink, and the weights that were written."""
    weights = fp8_weights(folder, 1)
    model, record = build_fp8(folder, tp, tp - 1, spread=spread)
    sink = VllmSink(model, record, no_caches)
    sink.begin_update()
    for region in sink.layout():
        hf = region.placement.hf
        sink.write(hf, weights[hf.name][hf.index].to(region.dtype))
    sink.end_update(1)
    return model, sink, weights


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.detach().contiguous().view(-1).view(torch.uint8)


def compare_with_loading(folder: Path, tp: int, spread: bool) -> dict[str, Any]:
    model, sink, weights = filled(folder, tp, spread)
    own, record = build_fp8(folder, tp, tp - 1, spread=spread, loaded=weights)
    expected, found = dict(own.named_parameters()), dict(model.named_parameters())
    names = [name for name in record.shapes if name in expected]  # vLLM removes KV-cache scales after it has read them
    as_stored = [r.placement.hf for r in sink.layout() if r.dtype == weights[r.placement.hf.name].dtype]
    return {
        "wrong": [name for name in names if not torch.equal(bits(expected[name]), bits(found[name]))],
        "codes": sum(expected[name].itemsize == 1 for name in names),
        "digests": [
            str(hf)
            for hf, digest in zip(as_stored, sink.digests(as_stored), strict=True)
            if digest != slice_digest(weights[hf.name][hf.index], hf)
        ],
        "stale": sink.probe(),
        "absorbed": [name for name, m in model.named_modules() if isinstance(getattr(m, "W_UV", None), torch.Tensor)],
        "absorbed_wrong": [
            name
            for (name, mine), (_, theirs) in zip(model.named_modules(), own.named_modules(), strict=True)
            if isinstance(getattr(mine, "W_UV", None), torch.Tensor)
            and not (torch.equal(mine.W_UV, theirs.W_UV) and torch.equal(mine.W_UK_T, theirs.W_UK_T))
        ],
    }


@every_model
def test_written_fp8_values_equal_loaded_ones_and_give_the_same_absorbed_copies(
    recorder: ProcessPoolExecutor, tmp_path: Path, family: str, tp: int, spread: bool
) -> None:
    found = run(recorder, compare_with_loading, make_fp8_model(tmp_path, family), tp, spread)
    assert found["wrong"] == found["digests"] == found["absorbed_wrong"] == []
    assert found["codes"] >= 8
    assert found["stale"] == {}
    assert bool(found["absorbed"]) == (family == "deepseek_v3")


def spoil(folder: Path) -> dict[str, Any]:
    """Change single bits in an engine with correct weights, and return what verification finds."""
    model, sink, weights = filled(folder, 1, False)
    parameters = dict(model.named_parameters())
    found: dict[str, Any] = {}
    down = next(r.placement.hf for r in sink.layout() if r.placement.hf.name.endswith("o_proj.weight"))
    scale = next(r.placement.hf for r in sink.layout() if r.placement.hf.name.endswith("o_proj.weight_scale_inv"))
    for what, hf in (("code", down), ("scale", scale)):
        values = parameters[hf.name].data
        before = values.clone()
        bits_of = values.view(-1).view(torch.uint8)
        bits_of[7] ^= 1
        found[what] = sink.digests([hf])[0] == slice_digest(weights[hf.name][hf.index], hf)
        values.copy_(before)
    latent = next(m for m in model.modules() if isinstance(getattr(m, "W_UV", None), torch.Tensor))
    latent.kv_b_proj.weight_scale_inv.data.view(-1)[0] *= 2  # type: ignore[union-attr]
    found["absorbed"] = sink.probe()
    sink.end_update(2)
    found["rebuilt"] = sink.probe()
    return found


def test_a_flipped_bit_of_an_fp8_value_or_a_scale_and_a_stale_absorbed_copy_are_found(
    recorder: ProcessPoolExecutor, tmp_path: Path
) -> None:
    found = run(recorder, spoil, make_fp8_model(tmp_path, "deepseek_v3"))
    assert found["code"] is False
    assert found["scale"] is False
    assert "elements of W_" in found["absorbed"]["model.layers.0.self_attn.kv_b_proj.weight"]
    assert found["rebuilt"] == {}


class MarlinFP8ScaledMMLinearKernel:
    """A stub with the name of a kernel that transposes and packs weights."""


def declaration_errors(folder: Path) -> list[str]:
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend

    model, record = build_fp8(folder, 1, 0)
    layer: Any = model.get_submodule("model.layers.0.self_attn.o_proj")
    experts: Any = next(m for m in model.modules() if hasattr(m, "w13_weight"))
    said = []

    def declare() -> None:
        try:
            declare_regions(model, record)
            said.append("")
        except RuntimeError as error:
            said.append(str(error))

    declare()
    kernel, layer.quant_method.fp8_linear = layer.quant_method.fp8_linear, MarlinFP8ScaledMMLinearKernel()
    declare()
    layer.quant_method.fp8_linear = kernel
    experts.quant_method.fp8_backend = Fp8MoeBackend.FLASHINFER_CUTLASS
    declare()
    experts.quant_method.fp8_backend = Fp8MoeBackend.TRITON
    square = model.get_submodule("model.layers.0.self_attn.o_proj").weight
    layer.weight = nn.Parameter(square.data.as_strided(square.shape, square.stride()[::-1]), requires_grad=False)
    declare()
    return said


def test_kernels_that_may_change_the_weights_and_a_transposed_weight_are_rejected(
    recorder: ProcessPoolExecutor, tmp_path: Path
) -> None:
    folder = make_fp8_model(tmp_path, "qwen3_moe", head_dim=64)
    fine, marlin, flashinfer, transposed = run(recorder, declaration_errors, folder)
    assert fine == ""
    assert "self_attn.o_proj.weight by MarlinFP8ScaledMMLinearKernel" in marlin
    assert "w13_weight by FLASHINFER_CUTLASS experts" in flashinfer
    assert "o_proj.weight in an unknown form" in transposed


LAYOUTS: list[tuple[str, dict[str, Any], int, bool, str]] = [
    ("qwen3", {}, 2, False, ""),
    ("qwen3", {}, 4, False, ""),  # two ranks share a key-value head
    ("qwen3", {"head_dim": 64}, 2, False, "key-value heads"),
    ("qwen3", {"intermediate_size": 640}, 1, False, ""),
    ("qwen3", {"intermediate_size": 640}, 2, False, "feed-forward size"),
    ("qwen3", {"intermediate_size": 576}, 1, False, "feed-forward size"),
    ("qwen3_moe", {}, 2, True, ""),
    ("qwen3_moe", {"moe_intermediate_size": 192}, 1, False, "feed-forward size of each expert"),
    ("qwen3_moe", {}, 4, False, "feed-forward size of each expert"),
    ("qwen3_moe", {}, 4, True, ""),
    ("deepseek_v3", {"q_lora_rank": 192}, 1, False, "q_lora_rank"),
    ("deepseek_v3", {"kv_lora_rank": 192}, 1, False, ""),  # the last part of a fused parameter
    ("deepseek_v3", {}, 4, True, "query heads"),
]


def vllm_rejects(folder: Path, tp: int, spread: bool) -> bool:
    try:
        record_fp8(folder, tp, [tp - 1], spread)
    except (ValueError, CannotRecordError):
        return True
    return False


@pytest.mark.parametrize(("family", "changes", "tp", "spread", "cut"), LAYOUTS)
def test_the_layout_rules_reject_exactly_the_layouts_that_vllm_cannot_build_or_load(
    recorder: ProcessPoolExecutor,
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    tp: int,
    spread: bool,
    cut: str,
) -> None:
    folder = make_fp8_model(tmp_path, family, **changes)
    said = ""
    try:
        engine = EngineGrid(tp, experts_spread=spread)
        check_fp8_layout(read_spec(folder), ParallelConfig(), engine, latent_split=False, where="the model")
    except UserError as error:
        said = str(error)
    assert run(recorder, vllm_rejects, folder, tp, spread) == bool(said)
    if cut:
        assert f"engine.tp={tp}: the {cut} of the model" in said

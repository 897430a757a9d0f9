"""Bytes and seconds that the planner predicts for FP8, computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from grpo_mega.models.engine_memory import engine_weight_bytes
from grpo_mega.models.fp8_tensors import is_quantized, scales_shape
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.activations import Activations
from grpo_mega.planner.hardware import cluster_of, gpu_named
from grpo_mega.planner.phase_memory import RankMemory
from grpo_mega.planner.plan import plan_resources
from grpo_mega.planner.static_memory import ModelChunk, static_bytes
from grpo_mega.types import UserError
from tests.helpers.planner_cases import SIZES, config_of, inputs_of, memory_of, spec_of

MATRIX, EXPERT = 200, 300  # elements of the matrices in a layer of SIZES
NO_REFERENCE: dict[str, Any] = {"kl_coef": 0.0}


def fp8(**keys: Any) -> dict[str, Any]:
    return {"fp8": {"recipe": "blockwise", **keys}}


def fullest_rank(gpu: str = "h100-80g", **sections: dict[str, Any]) -> RankMemory:
    config = config_of(algorithm=NO_REFERENCE, **sections)
    rank: RankMemory = memory_of(config, spec_of(), 1, gpu).ranks[0]
    return rank


def test_a_weight_has_two_fp8_copies_beside_the_bf16_weight() -> None:
    chunk = ModelChunk((False, True, True), False, False, (False, True, True))
    plain = static_bytes([chunk], SIZES, inputs_of(config_of()))
    copied = static_bytes([chunk], SIZES, inputs_of(config_of(precision=fp8())))
    assert copied.fp8_copies == 2 * 2 * EXPERT  # the first layer stays in bf16
    assert (copied.weights, copied.optimizer) == (plain.weights, plain.optimizer)


def test_an_fp8_parameter_needs_only_one_more_fp8_copy() -> None:
    chunk = ModelChunk((False,), False, False, (True,))
    plain = static_bytes([chunk], SIZES, inputs_of(config_of()))
    held = static_bytes([chunk], SIZES, inputs_of(config_of(precision=fp8(params=True))))
    assert (held.weights, held.fp8_copies) == (plain.weights - MATRIX, MATRIX)
    assert held.gradients == plain.gradients


def test_fp8_copies_of_an_offloaded_policy_are_freed_if_they_can_be_made_again() -> None:
    copied, held = fullest_rank(precision=fp8()), fullest_rank(precision=fp8(params=True))
    blocks_of_32 = fullest_rank(precision=fp8(params=True, recipe="mxfp8"))
    assert copied.phases["train"]["FP8 copies"] == 2 * 2 * MATRIX
    assert held.phases["train"]["FP8 copies"] == 2 * MATRIX
    assert "FP8 copies" not in copied.phases["rollout"] | held.phases["rollout"]
    assert blocks_of_32.phases["rollout"]["FP8 copies"] == 2 * MATRIX
    assert "FP8 copies" not in fullest_rank().phases["train"]


@pytest.mark.parametrize(("first", "last", "layers"), [(0, 0, 2), (1, 0, 1), (1, 1, 0)])
def test_first_and_last_layers_can_stay_in_bf16(first: int, last: int, layers: int) -> None:
    found = fullest_rank(precision=fp8(first_layers_bf16=first, last_layers_bf16=last))
    assert found.phases["train"].get("FP8 copies", 0) == 2 * MATRIX * layers


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_inputs_of_matrix_products_are_stored_in_one_byte(family: str) -> None:
    """A token of llama keeps two normed states, the attention's output (twice: the core keeps it too) and a product.

    For qwen3_moe, the inputs of the experts and their products take the place of the product, for two experts per token
    of the busiest rank, which has 1.25 times the mean.
    """
    spec = spec_of(family)
    is_moe = spec.is_moe_layer(0)
    kinds = {}
    for name, precision in (("bf16", {}), ("fp8", fp8())):
        config = config_of(precision=precision, parallel={"recompute": "none"})  # rows of 256 tokens
        acts = Activations(inputs_of(config, spec))
        kinds[name] = acts.layer(is_moe, name == "fp8").kept
    h, attended = spec.hidden_size, spec.num_heads * spec.head_dim
    saved = 2 * h
    if is_moe:
        assert spec.moe is not None
        saved += 1.25 * spec.moe.top_k * (h + spec.moe.expert_ffn_size)
    else:
        saved += spec.ffn_size
    assert kinds["bf16"] - kinds["fp8"] == pytest.approx(256 * (saved - attended))


def test_a_device_without_the_recipe_is_rejected() -> None:
    config = config_of(precision=fp8(), algorithm=NO_REFERENCE)
    with pytest.raises(UserError, match=r"^--gpu=a100-80g: precision\.fp8\.recipe=blockwise .*H100"):
        plan_resources(config, spec_of(), lambda **_: SIZES, cluster_of(gpu_named("a100-80g"), 1), "x")


def test_an_fp8_engine_stores_a_byte_per_matrix_element_and_a_scale_per_block() -> None:
    # llama: vocab 21, hidden 64, ffn 96, 2 layers, 4 heads and 2 key heads of 16, every matrix within one block
    outer, norms = 2 * 21 * 64, 5 * 64
    matrices, scales = 2 * (2 * 64 * 64 + 3 * 64 * 96), 2 * 5
    keys, key_scales = 2 * 2 * 32 * 64, 2 * 2
    whole = 2 * (outer + norms) + matrices + keys + 4 * (scales + key_scales)
    assert engine_weight_bytes(spec_of(), Topology(1), 2, spread=False, fp8=True) == whole
    assert engine_weight_bytes(spec_of(), Topology(2, engine_tp=2), 2, spread=False, fp8=True) == whole / 2 + norms


def test_the_last_latent_projection_is_stored_in_bf16_and_in_fp8() -> None:
    spec, one = spec_of("deepseek_v3"), Topology(1)
    plain, quantized = (engine_weight_bytes(spec, one, 2, spread=False, fp8=fp8) for fp8 in (False, True))
    shapes = {name: shape for name, shape in hf_shapes(spec_of("deepseek_v3")).items() if is_quantized(name, shape)}
    blocks = sum(math.prod(scales_shape(shape)) for shape in shapes.values())
    assert plain - quantized == sum(math.prod(shape) for shape in shapes.values()) - 4 * blocks


def test_an_fp8_engine_is_planned_and_rejected_on_a_device_without_fp8() -> None:
    config = config_of(engine={"fp8": "scales_fp32"}, algorithm=NO_REFERENCE)
    plain, quantized = (
        plan_resources(each, spec_of(), lambda **_: SIZES, cluster_of(gpu_named("h100-80g"), 1), "x")
        for each in (config_of(algorithm=NO_REFERENCE), config)
    )
    engine = engine_weight_bytes(spec_of(), Topology(1), 2, spread=False, fp8=True)
    assert (
        quantized.sync_bytes == quantized.memory.ranks[0].phases["sync"]["engine weights"] == engine < plain.sync_bytes
    )
    assert quantized.time.phases["sync"] < plain.time.phases["sync"]
    assert quantized.time.phases["rollout"] < plain.time.phases["rollout"]
    with pytest.raises(UserError, match=r"^--gpu=a100-80g: engine\.fp8 .*; remove"):
        plan_resources(config, spec_of(), lambda **_: SIZES, cluster_of(gpu_named("a100-80g"), 1), "x")


def test_passes_in_fp8_take_less_time() -> None:
    cluster = cluster_of(gpu_named("h100-80g"), 1)
    plain, fast = (
        plan_resources(
            config_of(precision=p, algorithm=NO_REFERENCE), spec_of(), lambda **_: SIZES, cluster, "x"
        ).time.phases
        for p in ({}, fp8())
    )
    assert plain["train"] / fast["train"] == pytest.approx(cluster.assumptions.fp8_speedup)
    assert plain["rollout"] == fast["rollout"]


def test_fp8_copies_are_freed_between_microbatches() -> None:
    from grpo_mega.policy.fp8 import forget_copies

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    inner: Any = model[1]
    inner[0]._fp8_workspaces = {"weight": torch.zeros(2, 2)}
    forget_copies([model])
    assert inner[0]._fp8_workspaces == {}

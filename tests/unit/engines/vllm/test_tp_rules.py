"""Unsupported splits are rejected, and the reference table of layouts covers every element exactly once."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest

from grpo_mega.engines.vllm.tp_rules import check_tp
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import TensorSlice, UserError
from tests.helpers.vllm_table import engine_layout

VOCAB = 70  # padded to 128: at tp=4 rank 2 holds 6 rows and rank 3 none


def config(architecture: str = "Qwen3ForCausalLM", **changes: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
    } | changes


def spec_of(settings: dict[str, Any]) -> ModelSpec:
    return spec_from_config(settings, "config.json")


CONFIGS = {
    "qwen3": config(),
    "qwen3-tied": config(tie_word_embeddings=True),
    "qwen2": config("Qwen2ForCausalLM"),
    "llama": config("LlamaForCausalLM"),
    "four-kv-heads": config("LlamaForCausalLM", num_key_value_heads=4),
    "one-kv-head": config(num_key_value_heads=1),
}


def hf_shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that transformers saves for this config, from its own model on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    names = {"Qwen3ForCausalLM": "qwen3", "Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(names[settings["architectures"][0]], **settings))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def elements(box: TensorSlice) -> Counter[tuple[str, tuple[int, ...]]]:
    ranges = [range(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True)]
    return Counter((box.name, index) for index in product(*ranges))


def local_shapes(settings: dict[str, Any], tp: int) -> dict[str, tuple[int, ...]]:
    """Return the parameters of vLLM's model on a rank, from the rules of its modules and not from the table."""
    hidden, head, ffn = settings["hidden_size"], settings["head_dim"], settings["intermediate_size"] // tp
    heads, kv_heads = settings["num_attention_heads"] // tp, max(1, settings["num_key_value_heads"] // tp)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128 // tp, hidden),
        "model.norm.weight": (hidden,),
    }
    if not settings["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (128 // tp, hidden)
    architecture = settings["architectures"][0]
    for layer in range(settings["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        linears = {
            "self_attn.qkv_proj": ((heads + 2 * kv_heads) * head, hidden, "Qwen2" in architecture),
            "self_attn.o_proj": (hidden, heads * head, False),
            "mlp.gate_up_proj": (2 * ffn, hidden, False),
            "mlp.down_proj": (hidden, ffn, False),
        }
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (hidden,)
        if "Qwen3" in architecture:
            shapes |= {f"{prefix}.self_attn.{norm}.weight": (head,) for norm in ("q_norm", "k_norm")}
    return shapes


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_regions_of_each_rank_fill_its_parameters_once_except_vocabulary_padding(name: str, tp: int) -> None:
    settings = CONFIGS[name]
    shapes = local_shapes(settings, tp)
    for rank in range(tp):
        regions = engine_layout(spec_of(settings), tp, rank, packed_head=True)
        written: Counter[tuple[str, tuple[int, ...]]] = Counter()
        for region in regions:
            assert region.placement.hf.shape == region.placement.local.shape
            written += elements(region.placement.local)
        assert set(written.values()) == {1}
        whole = {(name, index) for name, shape in shapes.items() for index in product(*(range(size) for size in shape))}
        assert set(written) <= whole
        real_rows = min(max(VOCAB - rank * (128 // tp), 0), 128 // tp)
        for parameter, index in whole - set(written):
            assert parameter in ("model.embed_tokens.weight", "lm_head.weight")
            assert index[0] >= real_rows


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_ranks_together_hold_every_checkpoint_element_as_often_as_vllm_replicates_it(name: str, tp: int) -> None:
    settings = CONFIGS[name]
    taken: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for rank in range(tp):
        for region in engine_layout(spec_of(settings), tp, rank, packed_head=True):
            taken += elements(region.placement.hf)
    kv_copies = max(1, tp // settings["num_key_value_heads"])
    expected: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for tensor, shape in hf_shapes(settings).items():
        whole = "norm" in tensor or tensor.endswith(("o_proj.bias", "down_proj.bias"))
        copies = tp if whole else kv_copies if ("k_proj" in tensor or "v_proj" in tensor) else 1
        expected.update({(tensor, index): copies for index in product(*(range(size) for size in shape))})
    assert taken == expected


def test_kv_head_of_a_rank_is_the_one_its_query_heads_use() -> None:
    # 4 query heads, 2 KV heads, tp=4: query head r uses KV head r // 2.
    for rank in range(4):
        regions = engine_layout(spec_of(CONFIGS["qwen3"]), 4, rank, packed_head=True)
        keys = [r.placement.hf for r in regions if r.placement.hf.name == "model.layers.0.self_attn.k_proj.weight"]
        assert keys == [TensorSlice(keys[0].name, (4 * (rank // 2), 0), (4, 8))]


def test_fused_parameter_stacks_query_key_value() -> None:
    regions = engine_layout(spec_of(CONFIGS["qwen2"]), 2, 1, packed_head=True)
    rows = {
        r.placement.hf.name.split(".")[4]: (
            r.placement.hf.offsets[0],
            r.placement.local.offsets[0],
            r.placement.hf.shape,
        )
        for r in regions
        if r.placement.local.name == "model.layers.1.self_attn.qkv_proj.bias"
    }
    assert rows == {"q_proj": (8, 0, (8,)), "k_proj": (4, 8, (4,)), "v_proj": (4, 12, (4,))}


@pytest.mark.parametrize(("tied", "packed", "derived"), [
    (False, True, {"lm_head.weight"}),
    (True, True, {"model.embed_tokens.weight"}),
    (False, False, set()),
])  # fmt: skip
def test_only_a_packed_head_is_derived(tied: bool, packed: bool, derived: set[str]) -> None:
    regions = engine_layout(spec_of(config(tie_word_embeddings=tied)), 1, 0, packed_head=packed)
    assert {r.placement.local.name for r in regions if r.kind == "derived"} == derived


@pytest.mark.parametrize(("changes", "tp", "message"), [
    ({}, 3, "engine.tp=3 does not divide num_attention_heads=4"),
    ({"num_attention_heads": 12, "num_key_value_heads": 6}, 4, "engine.tp=4 .*num_key_value_heads=6"),
])  # fmt: skip
def test_an_unsupported_tp_is_rejected_with_its_key(changes: dict[str, Any], tp: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_tp(spec_of(config(**changes)), tp)

"""The tables between Hugging Face and Megatron: each element has one place, and unsupported configs are rejected."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo_mega.models.config_readers import read_spec, spec_from_config
from grpo_mega.models.parameter_tables import hf_shapes, parameter_placements
from grpo_mega.models.placement_rules import Interleaved, Stacked, padded_vocab
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ALONE = Topology(1), Topology(1).coordinates(0)
VOCAB = 5  # with tp=4 there are two rows per rank: rank 2 has one row and one of padding, rank 3 only padding


def raw_config(family: str = "qwen3", **changes: Any) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURES[family]],
        "hidden_size": 24,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 3 if family != "qwen3" else 6,  # heads x head_dim of qwen3 may differ from the hidden size
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    } | changes


def spec_of(family: str = "qwen3", **changes: Any) -> ModelSpec:
    return spec_from_config(raw_config(family, **changes), "config.json")


def message_of(raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        spec_from_config(raw, "config.json")
    return str(caught.value)


def test_the_spec_has_the_values_of_the_config() -> None:
    assert spec_of() == ModelSpec(
        family="qwen3",
        num_layers=2,
        hidden_size=24,
        ffn_size=12,
        num_heads=8,
        num_kv_heads=4,
        head_dim=6,
        vocab_size=5,
        max_positions=64,
        rope_theta=500000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
    )
    assert [(spec_of(f).qkv_bias, spec_of(f).qk_norm) for f in ("llama", "qwen2")] == [(False, False), (True, False)]


def test_rope_theta_is_read_in_both_forms() -> None:
    old = raw_config(rope_theta=7e5)
    new = raw_config(rope_parameters={"rope_theta": 8e5, "rope_type": "default"})
    del new["rope_theta"]
    neither = raw_config()
    del neither["rope_theta"]
    both = raw_config(rope_theta=8e5, rope_parameters={"rope_theta": 8e5})
    assert [spec_from_config(c, "").rope_theta for c in (old, new, neither, both)] == [7e5, 8e5, 1e4, 8e5]


def test_optional_sizes_are_derived() -> None:
    raw = raw_config("llama", head_dim=None)
    for name in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        del raw[name]
    spec = spec_from_config(raw, "")
    assert (spec.num_kv_heads, spec.head_dim, spec.norm_eps, spec.tie_embeddings) == (8, 3, 1e-6, False)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type=longrope"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, "mscale=1.0 with rope_type=linear"),
        ({"rope_parameters": {"mrope_section": [1]}}, "mrope_section=[1] with rope_type=default"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention (separate rotary settings)"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ({"use_sliding_window": True}, "use_sliding_window=true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window=true"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        *(
            ({"quantization_config": found}, f"quantization_config={found}")
            for found in (
                {"quant_method": "fp8"},
                {"quant_method": "fp8", "weight_block_size": [64, 64]},
                {"quant_method": "gptq", "weight_block_size": [128, 128]},
            )
        ),
    ],
)
def test_each_field_that_would_be_ignored_is_an_error_that_names_it(changes: dict[str, Any], field: str) -> None:
    message = message_of(raw_config(**changes))
    assert_names(message, "config.json", field, "not supported", "qwen3", "use a checkpoint without it")


def test_fields_with_default_values_are_accepted() -> None:
    harmless = {
        "rope_scaling": None,
        "layer_types": ["full_attention"] * 2,
        "use_sliding_window": False,
        "sliding_window": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "quantization_config": None,
        "partial_rotary_factor": 1.0,
    }
    assert spec_of(**harmless) == spec_of()
    assert spec_of(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}) == spec_of()


@pytest.mark.parametrize(
    "field",
    [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ],
)
def test_a_missing_field_is_named(field: str) -> None:
    raw = raw_config()
    del raw[field]
    assert_names(message_of(raw), "config.json", f"'{field}'", "missing", "Qwen3ForCausalLM")


def test_a_size_that_is_not_a_number_is_rejected() -> None:
    assert message_of(raw_config(vocab_size="many")).startswith("config.json: vocab_size=")
    assert message_of(raw_config(vocab_size=None)).startswith("config.json: vocab_size=")


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], [], None])
def test_the_error_of_an_unknown_architecture_lists_the_known_ones(architectures: list[str] | None) -> None:
    name = architectures[0] if architectures else "(none)"
    families = ("Llama", "Qwen2", "Qwen3", "Qwen3Moe", "Mixtral", "DeepseekV2", "DeepseekV3", "Glm4Moe", "GptOss")
    message = message_of(raw_config(architectures=architectures))
    assert_names(message, "config.json", f"architectures={name}", "use one of", *(f"{f}ForCausalLM" for f in families))


def test_a_folder_without_a_readable_config_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"has no config\.json; use a Hugging Face model folder"):
        read_spec(tmp_path)
    for content, rule in (("{", "not valid JSON"), ("[]", "must be a JSON object, not a list")):
        path.write_text(content)
        with pytest.raises(UserError, match=rule) as caught:
            read_spec(tmp_path)
        assert str(caught.value).startswith(f"{path}: ")
    path.write_text(json.dumps(raw_config()))
    assert read_spec(tmp_path) == spec_of()


HAND = spec_of("llama", hidden_size=3, num_attention_heads=4, num_key_value_heads=2, head_dim=2, intermediate_size=4)


def test_interleaved_query_key_value_by_hand() -> None:
    # 4 heads of 2 rows, 2 key-value heads: [q0 q1 k0 v0 | q2 q3 k1 v1]
    rule = Interleaved("q", "k", "v", bias=False)
    assert rule.hf_shapes(HAND) == {"q": (8, 3), "k": (4, 3), "v": (4, 3)}
    first = [("q", (0, 0), (0, 0), (4, 3)), ("k", (0, 0), (4, 0), (2, 3)), ("v", (0, 0), (6, 0), (2, 3))]
    assert list(rule.pieces(HAND, 1, 0)) == [
        *first,
        ("q", (4, 0), (8, 0), (4, 3)),
        ("k", (2, 0), (12, 0), (2, 3)),
        ("v", (2, 0), (14, 0), (2, 3)),
    ]
    assert list(rule.pieces(HAND, 2, 0)) == first
    assert list(rule.pieces(HAND, 2, 1)) == [
        ("q", (4, 0), (0, 0), (4, 3)),
        ("k", (2, 0), (4, 0), (2, 3)),
        ("v", (2, 0), (6, 0), (2, 3)),
    ]
    biases = Interleaved("q", "k", "v", bias=True)
    assert biases.hf_shapes(HAND) == {"q": (8,), "k": (4,), "v": (4,)}
    assert list(biases.pieces(HAND, 2, 1)) == [
        ("q", (4,), (0,), (4,)),
        ("k", (2,), (4,), (2,)),
        ("v", (2,), (6,), (2,)),
    ]


def test_stacked_gate_and_up_by_hand() -> None:
    rule = Stacked(("gate", "up"), rows=4, columns=3)
    assert rule.hf_shapes(HAND) == {"gate": (4, 3), "up": (4, 3)}
    assert list(rule.pieces(HAND, 1, 0)) == [("gate", (0, 0), (0, 0), (4, 3)), ("up", (0, 0), (4, 0), (4, 3))]
    assert list(rule.pieces(HAND, 2, 1)) == [("gate", (2, 0), (0, 0), (2, 3)), ("up", (2, 0), (2, 0), (2, 3))]


def test_vocabulary_is_padded_to_the_next_multiple_of_tp() -> None:
    assert [padded_vocab(VOCAB, tp) for tp in (1, 2, 4, 5)] == [5, 6, 8, 5]


def local_shapes(spec: ModelSpec, tp: int) -> dict[str, tuple[int, ...]]:
    """Return the parameter shapes of Megatron's model on a rank, written independently of the table."""
    hidden, width = spec.hidden_size, spec.head_dim
    rows = -(-spec.vocab_size // tp)
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * width // tp
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (rows, hidden)}
    for layer in range(spec.num_layers):
        at = f"decoder.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "self_attention.linear_qkv.weight": (heads, hidden),
            at + "self_attention.linear_proj.weight": (hidden, spec.num_heads * width // tp),
            at + "pre_mlp_layernorm.weight": (hidden,),
            at + "mlp.linear_fc1.weight": (2 * spec.ffn_size // tp, hidden),
            at + "mlp.linear_fc2.weight": (hidden, spec.ffn_size // tp),
        }
        if spec.family == "qwen2":
            shapes[at + "self_attention.linear_qkv.bias"] = (heads,)
        if spec.family == "qwen3":
            shapes |= {at + f"self_attention.{x}_layernorm.weight": (width,) for x in "qk"}
    return shapes | {"decoder.final_layernorm.weight": (hidden,), "output_layer.weight": (rows, hidden)}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_element_has_one_place_over_the_tensor_parallel_ranks(family: str, tied: bool, tp: int) -> None:
    spec = spec_of(family, tie_word_embeddings=tied)
    whole, ranks = hf_shapes(spec), Topology(tp, tp=tp)
    readers: Counter[str] = Counter()
    for parameter, shape in local_shapes(spec, tp).items():
        found: dict[str, np.ndarray] = {}
        for rank in range(tp):
            filled = np.zeros(shape, dtype=int)
            for placement in parameter_placements(spec, parameter, ranks, ranks.coordinates(rank)):
                hf, local = placement.hf, placement.local
                assert local.name == parameter
                assert hf.shape == local.shape
                region = found.setdefault(hf.name, np.zeros(whole[hf.name], dtype=int))[hf.index]
                assert region.shape == hf.shape
                region += 1
                assert filled[local.index].shape == local.shape
                filled[local.index] += 1
            real = shape[0]
            if parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
                real = max(0, min(shape[0], VOCAB - rank * shape[0]))
            assert (filled[:real] == 1).all(), parameter
            assert not filled[real:].any(), parameter
        copies = tp if "norm" in parameter else 1
        for name, count in found.items():
            assert (count == copies).all(), (parameter, name)
        readers.update(found.keys())
    expected = dict.fromkeys(whole, 1) | ({"model.embed_tokens.weight": 2} if tied else {})
    assert readers == expected


def test_layers_have_their_own_tensors_and_fused_norms_map_to_the_separate_norms() -> None:
    spec = spec_of()
    for fused, local in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ):
        placed = [
            [p.hf for p in parameter_placements(spec, f"decoder.layers.1.{name}", *ALONE)] for name in (fused, local)
        ]
        assert placed[0] == placed[1]
        assert placed[0][0].name.startswith("model.layers.1.")


def test_a_parameter_that_is_not_in_the_table_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"linear_qkv\.bias"):
        parameter_placements(spec_of("qwen3"), "decoder.layers.0.self_attention.linear_qkv.bias", *ALONE)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_tensors_equal_those_of_the_transformers_model(family: str, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = raw_config(family, tie_word_embeddings=tied)
    theta = settings.pop("rope_theta")
    config = AutoConfig.for_model(family, **settings, rope_parameters={"rope_type": "default", "rope_theta": theta})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spec = spec_from_config(config.to_dict(), "config.json")  # the config.json that transformers writes
    assert spec == spec_of(family, tie_word_embeddings=tied)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert hf_shapes(spec) == expected


def test_tensors_are_in_the_order_of_the_forward_pass() -> None:
    names = list(hf_shapes(spec_of()))
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == sorted(layers)

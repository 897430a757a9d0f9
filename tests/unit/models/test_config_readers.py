"""The config.json of every family, as transformers 4 and 5 write it: which fields are read and which are rejected."""

from __future__ import annotations

import math
from typing import Any

import pytest

from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.models.spec import ModelSpec, MoeSpec, RopeScaling
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names
from tests.helpers.family_configs import FAMILY_CONFIGS, raw_family_config


def read_family(family: str, **changes: Any) -> ModelSpec:
    return spec_from_config(raw_family_config(family, **changes), "config.json")


def error_of(family: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_family(family, **changes)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_config_written_by_transformers_is_read_as_the_same_model(family: str) -> None:
    from transformers import AutoConfig

    raw = raw_family_config(family)
    settings = {k: v for k, v in raw.items() if k not in ("model_type", "architectures")}
    written = AutoConfig.for_model(raw["model_type"], **settings).to_dict() | {"architectures": raw["architectures"]}
    assert spec_from_config(written, "config.json") == read_family(family)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_an_unknown_field_is_an_error_that_names_it(family: str) -> None:
    model_type = raw_family_config(family)["model_type"]
    error = error_of(family, final_logit_softcapping=30.0)
    assert_names(error, "config.json", "final_logit_softcapping", "not known", model_type, "remove it")
    assert read_family(family, final_logit_softcapping=None, use_cache=False, torch_dtype="bfloat16") == read_family(
        family
    )


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_each_field_of_a_family_is_read(family: str) -> None:
    """Changing any field of a config either changes the spec or is rejected."""
    raw = raw_family_config(family)
    plain = read_family(family)
    for name, value in raw.items():
        if name in ("architectures", "model_type", "head_dim"):
            continue
        other: Any = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5}.get(type(value))
        if other is None:
            continue
        assert spec_or_error(family, **{name: other(value)}) not in ("read", str(plain)), name


def spec_or_error(family: str, **changes: Any) -> str:
    """Return the spec; `rejected` if an error names the changed field; `read_family` after any other error."""
    try:
        return str(read_family(family, **changes))
    except UserError as error:
        return "rejected" if next(iter(changes)) in str(error) else "read"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_rope_scaling_is_read_in_both_forms() -> None:
    expected = RopeScaling("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0)
    old = read_family("llama", rope_scaling=LLAMA3 | {"original_max_position_embeddings": 32}, rope_theta=5e5)
    new = read_family("llama", rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32, "rope_theta": 5e5})
    assert old == new
    assert (old.rope, old.rope_theta) == (expected, 5e5)
    older = read_family("llama", rope_scaling={"type": "linear", "factor": 2})
    assert older.rope == RopeScaling("linear", 2.0)


def test_yarn_has_the_attention_factor_of_transformers() -> None:
    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16}
    for extra, expected in (
        ({}, 0.1 * math.log(40) + 1),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)),
        ({"mscale": 0.5}, 0.1 * math.log(40) + 1),
        ({"attention_factor": 1.5}, 1.5),
    ):
        rope = read_family("deepseek_v3", rope_scaling=yarn | extra, rope_parameters=None).rope
        assert rope is not None
        assert rope.attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": LLAMA3}, "rope_type"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "rope_type"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e6}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0},
          "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "factor"),
    ],
)  # fmt: skip
def test_contradicting_fields_are_an_error(changes: dict[str, Any], key: str) -> None:
    assert f"{key}=" in error_of("llama", **changes)
    assert "contradict each other" in error_of("llama", **changes)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "vocab_size", float("nan")),
        ("llama", "num_hidden_layers", float("inf")),
        ("llama", "num_attention_heads", 0),
        ("llama", "hidden_size", -64),
        ("llama", "rms_norm_eps", 10**400),
        ("llama", "architectures", {"x": []}),
        ("llama", "architectures", [{"name": "x"}]),
        ("llama", "layer_types", 3),
        ("qwen3_moe", "mlp_only_layers", False),
        ("qwen3_moe", "mlp_only_layers", ["x"]),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("qwen3_moe", "num_hidden_layers", 10**30),
    ],
)
def test_a_value_of_a_damaged_file_is_named(family: str, field: str, value: Any) -> None:
    assert_names(error_of(family, **{field: value}), "config.json", f"{field}=")


@pytest.mark.parametrize("missing", ["factor", "low_freq_factor", "high_freq_factor"])
def test_a_missing_rope_setting_is_named(missing: str) -> None:
    rope = {k: v for k, v in LLAMA3.items() if k != missing}
    words = ("config.json", "rope_type=llama3", missing, "download the file again")
    assert_names(error_of("llama", rope_scaling=rope), *words)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("mixtral", {"sliding_window": 4096}, "sliding_window=4096"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=true"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with normalized weights"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=true"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method=noaux_tc"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type=linear"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob=false"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func=softmax"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=false"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2 (less than num_attention_heads)"),
    ],
)
def test_unsupported_settings_of_a_family_are_rejected_by_name(
    family: str, changes: dict[str, Any], named: str
) -> None:
    model_type = raw_family_config(family)["model_type"]
    words = ("config.json", named, "not supported", model_type, "use a checkpoint without it")
    assert_names(error_of(family, **changes), *words)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        (
            "qwen3_moe",
            {"num_experts_per_tok": 9},
            "num_experts_per_tok=9 must be between 1 and",
        ),
        ("deepseek_v3", {"n_group": 3}, "n_group=3 does not divide n_routed_experts=8"),
        ("deepseek_v3", {"n_group": 8}, "n_group=8 does not divide n_routed_experts=8 into groups of 2"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group=5 of n_group=4"),
        ("deepseek_v3", {"topk_group": 1}, "topk_group=1 of n_group=4"),
    ],
)
def test_contradicting_numbers_of_experts_are_rejected(family: str, changes: dict[str, Any], named: str) -> None:
    assert named in error_of(family, **changes)


def test_layers_with_experts_are_read_from_the_config() -> None:
    def layers(family: str, **changes: Any) -> tuple[bool, ...]:
        moe = read_family(family, num_hidden_layers=4, **changes).moe
        assert isinstance(moe, MoeSpec)
        return moe.layers

    assert layers("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=2) == (False, True, False, True)
    assert layers("qwen3_moe", mlp_only_layers=[3], decoder_sparse_step=2) == (False, True, False, False)
    assert layers("deepseek_v3", first_k_dense_replace=3) == (False, False, False, True)
    assert layers("mixtral") == (True,) * 4

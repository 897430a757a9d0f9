"""Readers that turn a `config.json` into a `ModelSpec`, one for each model family.

A reader reads every field that it supports, and requires the neutral value of the fields that are not supported.
`Fields.finish` rejects all other fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mega.models.config_fields import Fields
from grpo_mega.models.rope_scaling import read_rope
from grpo_mega.models.spec import FP8_BLOCK, ClampedGate, MlaSpec, ModelSpec, MoeSpec
from grpo_mega.types import UserError

_SCALINGS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class FamilyReader:
    """The name of a family, and the function that reads its config."""

    family: str
    read: Callable[[Fields], ModelSpec]


def _common(
    fields: Fields, kinds: Collection[str], *, theta: float = 10000.0, fraction: float = 1.0, eps: float = 1e-6
) -> dict[str, Any]:
    """Read the fields of every family.

    `kinds` are the supported rotary scalings; the other arguments are the defaults of the family.
    """
    fields.only("hidden_act", "silu")
    fields.only("attention_dropout", 0, 0.0)
    quantized = fields.take("quantization_config")
    if quantized is not None and not _is_block_fp8(quantized) and not _is_mxfp4(quantized, fields.family):
        fields.reject(f"quantization_config={quantized}")
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    max_positions = fields.size("max_position_embeddings")
    rope = read_rope(fields, max_positions, kinds, theta=theta, fraction=fraction)
    return {
        "family": fields.family,
        "num_layers": fields.size("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_size": fields.size("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": fields.size("num_key_value_heads", default=heads),
        "head_dim": fields.maybe_whole("head_dim") or hidden // heads,
        "vocab_size": fields.size("vocab_size"),
        "max_positions": max_positions,
        "rope_theta": rope.theta,
        "rotary_fraction": rope.fraction,
        "rope": rope.scaling,
        "norm_eps": fields.number("rms_norm_eps", default=eps),
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "qkv_bias": False,
        "qk_norm": False,
    }


def _is_block_fp8(found: dict[str, Any]) -> bool:
    return bool(found.get("quant_method") == "fp8" and found.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK])


def _is_mxfp4(found: dict[str, Any], family: str) -> bool:
    return bool(
        found.get("quant_method") == "mxfp4" and family == "gpt_oss"
    )  # the quantized tensors are found in the files


def _no_partial_rotary(fields: Fields, common: dict[str, Any]) -> dict[str, Any]:
    """Reject partial rotary embeddings, which transformers ignores for these families."""
    if common["rotary_fraction"] != 1.0:
        fields.reject(f"partial_rotary_factor={common['rotary_fraction']}")
    return common


def _no_sliding_window(fields: Fields) -> None:
    """Reject sliding windows; `sliding_window` and `max_window_layers` have no effect while windows are off."""
    sliding = "sliding_attention" in (fields.items("layer_types", kind=str) or ())
    if fields.flag("use_sliding_window") or sliding:
        fields.reject("use_sliding_window=true")
    fields.unused("sliding_window", "max_window_layers")


def _no_biases(fields: Fields) -> None:
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)


def read_llama(fields: Fields) -> ModelSpec:
    """Read Llama 2 and 3.x."""
    fields.only("pretraining_tp", 1)
    _no_biases(fields)
    _no_sliding_window(fields)
    return ModelSpec(**_no_partial_rotary(fields, _common(fields, _SCALINGS)))


def read_qwen2(fields: Fields) -> ModelSpec:
    """Read Qwen2 and Qwen2.5: biases on query, key and value."""
    _no_biases(fields)
    _no_sliding_window(fields)
    return ModelSpec(**_no_partial_rotary(fields, _common(fields, _SCALINGS)) | {"qkv_bias": True})


def read_qwen3(fields: Fields) -> ModelSpec:
    """Read Qwen3: a norm on each head of query and key."""
    _no_biases(fields)
    _no_sliding_window(fields)
    common = _no_partial_rotary(fields, _common(fields, _SCALINGS))
    return ModelSpec(**common | {"qk_norm": True})


def read_qwen3_moe(fields: Fields) -> ModelSpec:
    """Read Qwen3-MoE: softmax over all experts, the best `num_experts_per_tok`, renormalized or not."""
    _no_biases(fields)
    _no_sliding_window(fields)
    common = _no_partial_rotary(fields, _common(fields, _SCALINGS))
    step = fields.whole("decoder_sparse_step", default=1)
    dense = fields.items("mlp_only_layers", kind=int, default=[]) or ()
    if step < 1:
        fields.reject(f"decoder_sparse_step={step}")
    moe = MoeSpec(
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(common["num_layers"])),
        num_experts=fields.whole("num_experts", "num_local_experts"),
        top_k=fields.whole("num_experts_per_tok"),
        expert_ffn_size=fields.whole("moe_intermediate_size"),
        score="softmax",
        normalize=fields.flag("norm_topk_prob"),
    )
    return ModelSpec(**common | {"qk_norm": True, "moe": _checked(fields, moe)})


def read_mixtral(fields: Fields) -> ModelSpec:
    """Read Mixtral: experts in every layer, weights renormalized over the chosen experts."""
    fields.only("router_jitter_noise", 0, 0.0)
    fields.only("sliding_window")
    common = _no_partial_rotary(fields, _common(fields, _SCALINGS, theta=1e6, eps=1e-5))
    moe = MoeSpec(
        layers=(True,) * common["num_layers"],
        num_experts=fields.whole("num_local_experts", "num_experts"),
        top_k=fields.whole("num_experts_per_tok", default=2),
        expert_ffn_size=common["ffn_size"],
        score="softmax",
        normalize=True,
    )
    return ModelSpec(**common | {"moe": _checked(fields, moe)})


def read_deepseek_v2(fields: Fields) -> ModelSpec:
    """Read DeepSeek-V2: latent attention, and a softmax router whose weights are not renormalized."""
    common = _latent_attention(fields)
    fields.only("scoring_func", "softmax")
    fields.only("norm_topk_prob", False)
    method = fields.take("topk_method", default="greedy")
    if method not in ("greedy", "group_limited_greedy"):
        fields.reject(f"topk_method={method}")
    groups, best = fields.maybe_whole("n_group"), fields.maybe_whole("topk_group")
    limited = method == "group_limited_greedy"
    moe = MoeSpec(
        **_deepseek_experts(fields, common),
        score="softmax",
        normalize=False,
        num_groups=groups or 1 if limited else 1,
        top_groups=best or 1 if limited else 1,
        group_best=1,
    )
    return ModelSpec(**common | {"moe": _checked(fields, moe)})


def read_deepseek_v3(fields: Fields) -> ModelSpec:
    """Read DeepSeek-V3 and R1: latent attention; sigmoid router with correction bias."""
    common = _latent_attention(fields)
    fields.only("rope_interleave", True)
    return ModelSpec(**common | {"moe": _sigmoid_moe(fields, common), "num_mtp_layers": _mtp(fields)})


def read_glm4_moe(fields: Fields) -> ModelSpec:
    """Read GLM-4.5: grouped queries with biases and half-rotated heads; the router of DeepSeek-V3."""
    common = _common(fields, _SCALINGS, fraction=0.5, eps=1e-5)
    common |= {"qkv_bias": fields.flag("attention_bias"), "qk_norm": fields.flag("use_qk_norm")}
    return ModelSpec(**common | {"moe": _sigmoid_moe(fields, common), "num_mtp_layers": _mtp(fields)})


def read_gpt_oss(fields: Fields) -> ModelSpec:
    """Read gpt-oss: biases in every linear layer, attention sinks, and a sliding window in every other layer."""
    fields.only("attention_bias", True)
    fields.unused("initial_context_length")  # repeats rope_scaling
    common = _no_partial_rotary(fields, _common(fields, _SCALINGS, theta=150000.0, eps=1e-5))
    window, kinds = fields.maybe_whole("sliding_window"), fields.items("layer_types", kind=str)
    if kinds is None:
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(common["num_layers"])]
    if len(kinds) != common["num_layers"]:
        raise UserError(
            f"{fields.where}: layer_types has {len(kinds)} entries, num_hidden_layers={common['num_layers']}",
            remedy="download it again",
        )
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        fields.reject(f"layer_types={sorted(unknown)}")
    moe = MoeSpec(
        layers=(True,) * common["num_layers"],
        num_experts=fields.whole("num_local_experts", "num_experts"),
        top_k=fields.whole("num_experts_per_tok", "experts_per_token"),
        expert_ffn_size=common["ffn_size"],
        score="softmax",
        normalize=True,
        gate=ClampedGate(fields.number("swiglu_alpha", default=1.702), fields.number("swiglu_limit", default=7.0)),
    )
    return ModelSpec(
        **common
        | {"qkv_bias": True, "output_bias": True, "attention_sinks": True, "moe": _checked(fields, moe)}
        | {"sliding_window": window or 0, "windowed": tuple(bool(window) and k == "sliding_attention" for k in kinds)}
    )


def _latent_attention(fields: Fields) -> dict[str, Any]:
    fields.only("pretraining_tp", 1)
    _no_biases(fields)
    common = _no_partial_rotary(fields, _common(fields, ("yarn",)))
    mla = MlaSpec(
        q_rank=fields.maybe_whole("q_lora_rank"),
        kv_rank=fields.whole("kv_lora_rank"),
        nope_dim=fields.whole("qk_nope_head_dim"),
        rope_dim=fields.whole("qk_rope_head_dim"),
        v_dim=fields.whole("v_head_dim"),
        latent_norm_eps=1e-6,  # transformers uses this value whatever the config says
    )
    fields.unused("qk_head_dim")  # the sum of the two
    if common["num_kv_heads"] != common["num_heads"]:
        fields.reject(f"num_key_value_heads={common['num_kv_heads']} (less than num_attention_heads)")
    return common | {"mla": mla, "head_dim": mla.v_dim}


def _sigmoid_moe(fields: Fields, common: dict[str, Any]) -> MoeSpec:
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    moe = MoeSpec(
        **_deepseek_experts(fields, common),
        score="sigmoid",
        normalize=fields.flag("norm_topk_prob", default=True),
        num_groups=fields.whole("n_group", default=1),
        top_groups=fields.whole("topk_group", default=1),
        group_best=2,
        correction_bias=True,
    )
    if not moe.normalize:
        fields.reject("norm_topk_prob=false")
    return _checked(fields, moe)


def _deepseek_experts(fields: Fields, common: dict[str, Any]) -> dict[str, Any]:
    first, step = fields.whole("first_k_dense_replace", default=0), fields.whole("moe_layer_freq", default=1)
    if step != 1:
        fields.reject(f"moe_layer_freq={step}")
    width = fields.whole("moe_intermediate_size")
    return {
        "layers": tuple(i >= first for i in range(common["num_layers"])),
        "num_experts": fields.whole("n_routed_experts", "num_local_experts", "num_experts"),
        "top_k": fields.whole("num_experts_per_tok"),
        "expert_ffn_size": width,
        "scaling": fields.number("routed_scaling_factor", default=1.0),
        "shared_ffn_size": width * (fields.maybe_whole("n_shared_experts") or 0),
    }


def _mtp(fields: Fields) -> int:
    return fields.whole("num_nextn_predict_layers", "num_mtp_layers", default=0)


def _checked(fields: Fields, moe: MoeSpec) -> MoeSpec:
    """Return `moe`, or raise UserError if its numbers contradict each other."""
    where = fields.where
    if not 1 <= moe.top_k <= moe.num_experts:
        raise UserError(
            f"{where}: num_experts_per_tok={moe.top_k} must be between 1 and the number of experts, {moe.num_experts}",
            remedy="download it again",
        )
    if moe.top_k == 1 and moe.normalize:
        # Megatron leaves a single weight as it is, transformers makes it 1
        fields.reject("num_experts_per_tok=1 with normalized weights")
    group_size, rest = divmod(moe.num_experts, moe.num_groups)
    if moe.num_groups > 1 and (rest or group_size < moe.group_best):
        raise UserError(
            f"{where}: n_group={moe.num_groups} does not divide n_routed_experts={moe.num_experts} into groups of "
            f"{moe.group_best} or more",
            remedy="download it again",
        )
    if not 1 <= moe.top_groups <= moe.num_groups or moe.top_groups * group_size < moe.top_k:
        raise UserError(
            f"{where}: topk_group={moe.top_groups} of n_group={moe.num_groups} groups hold fewer than "
            f"num_experts_per_tok={moe.top_k} experts",
            remedy="download it again",
        )
    return moe


READERS = {
    "LlamaForCausalLM": FamilyReader("llama", read_llama),
    "Qwen2ForCausalLM": FamilyReader("qwen2", read_qwen2),
    "Qwen3ForCausalLM": FamilyReader("qwen3", read_qwen3),
    "Qwen3MoeForCausalLM": FamilyReader("qwen3_moe", read_qwen3_moe),
    "MixtralForCausalLM": FamilyReader("mixtral", read_mixtral),
    "DeepseekV2ForCausalLM": FamilyReader("deepseek_v2", read_deepseek_v2),
    "DeepseekV3ForCausalLM": FamilyReader("deepseek_v3", read_deepseek_v3),
    "Glm4MoeForCausalLM": FamilyReader("glm4_moe", read_glm4_moe),
    "GptOssForCausalLM": FamilyReader("gpt_oss", read_gpt_oss),
}

FAMILIES = {architecture: reader.family for architecture, reader in READERS.items()}


def read_spec(folder: Path) -> ModelSpec:
    """Read the `config.json` of a model folder.

    Raises:
        UserError: the file is missing or malformed, or its architecture or a field is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"model.path={folder} has no config.json", remedy="use a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})", remedy="download the file again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a JSON object, not a {type(raw).__name__}", remedy="download the file again")
    return spec_from_config(raw, str(path))


def spec_from_config(raw: dict[str, Any], where: str) -> ModelSpec:
    """Return the spec for the fields of a `config.json`; error messages call its path `where`.

    Raises:
        UserError: the architecture or a field is not supported.
    """
    named = raw.get("architectures") or ["(none)"]
    architecture = named[0] if isinstance(named, list) else named
    if not isinstance(architecture, str) or architecture not in READERS:
        raise UserError(
            f"{where}: architectures={architecture} is not supported", remedy=f"use one of {', '.join(READERS)}"
        )
    reader = READERS[architecture]
    fields = Fields(raw, where, architecture, reader.family)
    spec = reader.read(fields)
    fields.finish()
    return spec

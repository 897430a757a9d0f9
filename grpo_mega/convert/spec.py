"""What a checkpoint's `config.json` says of its model, checked: a field that we would have to ignore is an error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mega.types import UserError

FP8_BLOCK = 128  # rows and columns of a block of an FP8 weight that share a scale

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class ModelSpec:
    """Sizes in elements. `rope_theta` is the base of the rotary frequencies, `norm_eps` is added to the mean square."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool


def read_spec(folder: Path) -> ModelSpec:
    """Raises UserError: no or malformed config.json, an architecture without a table, an unsupported field."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"model.path={folder} holds no config.json; give a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); download the file again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a {type(raw).__name__}, a model's config is an object; download the file again")
    return spec_from_config(raw, str(path))


def spec_from_config(raw: dict[str, Any], where: str) -> ModelSpec:
    """From the fields of a `config.json`; `where` is its path for messages."""
    architecture = (raw.get("architectures") or ["(none)"])[0]
    if architecture not in FAMILIES:
        raise UserError(f"{where}: architectures={architecture} is not supported; use one of {', '.join(FAMILIES)}")
    family = FAMILIES[architecture]
    _refuse_unsupported(raw, family, where)
    try:
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        return ModelSpec(
            family=family,
            num_layers=int(raw["num_hidden_layers"]),
            hidden_size=hidden,
            ffn_size=int(raw["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            vocab_size=int(raw["vocab_size"]),
            max_positions=int(raw["max_position_embeddings"]),
            rope_theta=_rope_theta(raw),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )
    except KeyError as error:
        raise UserError(f"{where}: the field {error} is missing; a {architecture} config has it") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: a size is not a number ({error}); download the file again") from None


def _rope_theta(raw: dict[str, Any]) -> float:
    # transformers 5 writes rope_parameters, earlier versions rope_theta
    return float((raw.get("rope_parameters") or {}).get("rope_theta") or raw.get("rope_theta") or 10000.0)


def _is_unquantised_or_block_fp8(raw: dict[str, Any]) -> bool:
    found = raw.get("quantization_config")
    if found is None:
        return True
    return bool(found.get("quant_method") == "fp8" and found.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK])


def _refuse_unsupported(raw: dict[str, Any], family: str, where: str) -> None:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    sliding = raw.get("use_sliding_window", False) or "sliding_attention" in (raw.get("layer_types") or ())
    # earlier versions of transformers have it beside the others, not inside
    rotated = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    found = {
        f"rope_type={rope_type}": rope_type != "default",
        "use_sliding_window=true": sliding,
        f"hidden_act={raw.get('hidden_act')}": raw.get("hidden_act", "silu") != "silu",
        "attention_bias=true": bool(raw.get("attention_bias")),
        "mlp_bias=true": bool(raw.get("mlp_bias")),
        f"quantization_config={raw.get('quantization_config')}": not _is_unquantised_or_block_fp8(raw),
        f"partial_rotary_factor={rotated}": rotated != 1.0,
    }
    for field, present in found.items():
        if present:
            raise UserError(f"{where}: {field} is not supported for {family}; use a checkpoint without it")

"""Checkpoints of every family in their published form.

They are bf16 with fp32 correction biases, multi-token-prediction layers, and FP8 blocks. Names come from `transformers`
and from the published index, not from the tables of the package.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo_mega.quantization import block_fp8
from tests.helpers.family_configs import raw_family_config
from tests.helpers.tiny_models import make_family_model

LINEAR = re.compile(r"\.(\w+_proj|kv_a_proj_with_mqa|w[123])\.weight$")


def make_published(folder: Path, family: str, *, quantized: bool = False, **changes: object) -> Path:
    """Write a checkpoint folder; `changes` are fields of its config."""
    raw = raw_family_config(family, **changes)
    make_family_model(folder, raw)
    tensors = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    if raw.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = raw["num_nextn_predict_layers"]
        tensors |= _mtp_layer(tensors, raw["num_hidden_layers"], raw["hidden_size"], raw["vocab_size"])
    if quantized:
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        tensors = _quantized(tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_published_mxfp4(folder: Path, **changes: object) -> Path:
    """Write gpt-oss in its published form: expert weights, whose inner sizes are multiples of 32, in MXFP4."""
    make_published(folder, "gpt_oss", **changes)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, length, columns = tensors.pop(name).shape
        shape = (experts, columns, length // 32)
        tensors[name + "_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[name + "_scales"] = torch.randint(119, 125, shape, dtype=torch.uint8, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    left_out = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left_out}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _mtp_layer(tensors: dict[str, Tensor], layer: int, hidden: int, vocab: int) -> dict[str, Tensor]:
    """Return an MTP layer as in DeepSeek-V3's model.safetensors.index.json: a layer and additional tensors."""
    generator = torch.Generator().manual_seed(layer)
    before, prefix = f"model.layers.{layer - 1}.", f"model.layers.{layer}."
    shapes = {
        prefix + name.removeprefix(before): tensor.shape for name, tensor in tensors.items() if name.startswith(before)
    }
    shapes |= {
        prefix + name: torch.Size((hidden,)) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    }
    shapes |= {
        prefix + name: torch.Size((vocab, hidden)) for name in ("embed_tokens.weight", "shared_head.head.weight")
    }
    shapes[prefix + "eh_proj.weight"] = torch.Size((hidden, 2 * hidden))
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: v if name.endswith("e_score_correction_bias") else v.bfloat16() for name, v in values.items()}


def _quantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found[name] = tensor
        if LINEAR.search(name) and "eh_proj" not in name:
            quantized, scales = block_fp8.quantize(tensor)
            # published scales may differ from the scales that the package would compute
            scales = scales * (1 + torch.rand(scales.shape, generator=generator))
            found |= {name: quantized, name + "_scale_inv": scales}
    return found

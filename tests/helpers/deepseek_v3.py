"""Write the headers of DeepSeek-V3's 671B checkpoint without its weights.

    python -m tests.helpers.deepseek_v3 FOLDER

Names and shapes come from `transformers` on the meta device; its save conversion renames them as in checkpoints. Linear
modules get block scales. The multi-token-prediction layer is the published one. The files are sparse: FOLDER has an
apparent size of 689 GB and uses a few megabytes.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

# https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json, without the default values of the class
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "dtype": "bfloat16",
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
BLOCK, FILE_BYTES = 128, 4_300_000_000
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def model_tensors() -> tuple[dict[str, Any], Tensors]:
    """Return the config, and name -> (dtype, shape) of each tensor of the checkpoint."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config
    from transformers.core_model_loading import revert_weight_conversion

    settings = {k: v for k, v in PUBLISHED.items() if k not in ("architectures", "quantization_config", "dtype")}
    config = DeepseekV3Config(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    saved = revert_weight_conversion(model, dict(model.state_dict()))
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    last, depth = config.num_hidden_layers - 1, config.num_hidden_layers
    around = {"enorm.weight": 1, "hnorm.weight": 1, "shared_head.norm.weight": 1, "eh_proj.weight": 2}
    prefix, hidden = f"model.layers.{depth}.", config.hidden_size
    mtp = {prefix + name: (hidden,) if width == 1 else (hidden, width * hidden) for name, width in around.items()}
    mtp |= {prefix + name: shapes["lm_head.weight"] for name in ("embed_tokens.weight", "shared_head.head.weight")}
    mtp |= {name.replace(f".{last}.", f".{depth}.", 1): s for name, s in shapes.items() if f"layers.{last}." in name}
    plain = tuple(f".{n}.weight" for n in ("gate", "eh_proj", "embed_tokens", "head", "lm_head"))
    tensors: Tensors = {}
    for name, shape in (shapes | mtp).items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = ("F32", shape)
        elif len(shape) == 1 or f".{name}".endswith(plain):
            tensors[name] = ("BF16", shape)
        else:
            tensors[name] = ("F8_E4M3", shape)
            tensors[name + "_scale_inv"] = ("F32", tuple(-(-n // BLOCK) for n in shape))
    return json.loads(config.to_json_string(use_diff=False)) | PUBLISHED, tensors


def write_headers(folder: Path) -> None:
    """Write files of at most `FILE_BYTES` and the index."""
    config, tensors = model_tensors()
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    groups: list[dict[str, Any]] = [{}]
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = sizes[dtype] * math.prod(shape)
        if groups[-1] and end + size > FILE_BYTES:
            groups.append({})
            end = 0
        groups[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    folder.mkdir(parents=True, exist_ok=True)
    placed: dict[str, str] = {}
    for number, header in enumerate(groups, start=1):
        path = folder / f"model-{number:05d}-of-{len(groups):06d}.safetensors"
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
        placed |= dict.fromkeys(header, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    write_headers(Path(sys.argv[1]))

"""Export in Hugging Face format: trained tensors, copied tensors, and the config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo_mega.checkpoint.export_hf import export_hf
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.models.config_readers import read_spec
from grpo_mega.models.parameter_tables import hf_shapes, hf_shapes_aside
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.quantization import block_fp8
from tests.helpers.family_configs import raw_family_config
from tests.helpers.tiny_models import make_tiny_model, store_head

ALONE = Ranks(Topology(1), Topology(1).coordinates(0), torch.device("cpu"))


class StubPolicy:
    """A policy with the one method that an export calls."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def full_tensors(self, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        del bucket_bytes
        yield from self._tensors.items()


@pytest.fixture(autouse=True)
def _no_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)


def make_base(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Write a base checkpoint and return its random tensors: a model with its multi-token-prediction layers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw_family_config(family)))
    spec = read_spec(folder)
    shapes = hf_shapes(spec) | hf_shapes_aside(spec)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_multi_token_prediction_layers_are_copied_unchanged(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family)
    aside = hf_shapes_aside(read_spec(tmp_path / "base"))
    assert any("eh_proj" in name for name in aside)
    trained = {name: tensor + 1 for name, tensor in base.items() if name not in aside}
    export_hf(StubPolicy(trained), tmp_path / "base", tmp_path / "hf", ALONE)  # type: ignore[arg-type]
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        wanted = base[name] if name in aside else trained[name]
        assert torch.equal(tensor.view(torch.int16), wanted.view(torch.int16)), name


def test_a_base_without_such_layers_is_exported_without_them(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "deepseek_v3")
    trained = {name: tensor for name, tensor in base.items() if name in hf_shapes(read_spec(tmp_path / "base"))}
    save_file(trained, tmp_path / "base" / "model.safetensors")
    export_hf(StubPolicy(trained), tmp_path / "base", tmp_path / "hf", ALONE)  # type: ignore[arg-type]
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == trained.keys()


def test_an_fp8_base_is_exported_dequantized_without_quantization_config(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "deepseek_v3", torch.float32)
    spec = read_spec(tmp_path / "base")
    name = next(name for name in hf_shapes_aside(spec) if name.endswith("eh_proj.weight"))
    codes, scales = block_fp8.quantize(base[name])
    save_file(base | {name: codes, name + block_fp8.SCALE_SUFFIX: scales}, tmp_path / "base" / "model.safetensors")
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    raw = raw_family_config("deepseek_v3", quantization_config=quantized)
    (tmp_path / "base" / "config.json").write_text(json.dumps(raw))
    trained = {name: tensor for name, tensor in base.items() if name in hf_shapes(spec)}
    export_hf(StubPolicy(trained), tmp_path / "base", tmp_path / "hf", ALONE)  # type: ignore[arg-type]
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == base.keys()
    assert torch.equal(found[name], block_fp8.dequantize(codes, scales, (0, 0)).to(torch.bfloat16))
    raw.pop("quantization_config")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == raw


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_names_the_dtype_of_the_exported_weights(key: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "deepseek_v3")
    raw = raw_family_config("deepseek_v3") | {key: "bfloat16"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(raw))
    trained = {name: base[name].float() for name in hf_shapes(read_spec(tmp_path / "base"))}
    export_hf(StubPolicy(trained), tmp_path / "base", tmp_path / "hf", ALONE)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == raw | {key: "float32"}


@pytest.mark.parametrize("head", ["copy", "different"])
def test_the_config_of_an_export_is_tied_exactly_if_the_policy_is(tmp_path: Path, head: Any) -> None:
    from transformers import AutoModelForCausalLM

    base = store_head(make_tiny_model(tmp_path / "base", "qwen3", True), head)
    shapes = hf_shapes(checkpoint_spec(base))
    trained = {name: tensor for name, tensor in load_file(base / "model.safetensors").items() if name in shapes}
    export_hf(StubPolicy(trained), base, tmp_path / "hf", ALONE)  # type: ignore[arg-type]
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == trained.keys()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is (head == "copy")
    logits = [
        AutoModelForCausalLM.from_pretrained(f)(torch.tensor([[3, 4, 5]])).logits for f in (base, tmp_path / "hf")
    ]
    assert torch.equal(*logits)

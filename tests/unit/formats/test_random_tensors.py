"""Random initial weights: the distributions of transformers, and the same values for every way to read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grpo_mega.formats import random_tensors
from grpo_mega.formats.random_tensors import RandomTensors
from grpo_mega.models.config_readers import read_spec
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import TensorSlice
from tests.helpers.family_configs import FAMILY_CONFIGS, raw_family_config

STD = 0.31


def spec_of(folder: Path, family: str) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(raw_family_config(family, initializer_range=STD)))
    return read_spec(folder)


def whole(tensors: RandomTensors, name: str, shape: tuple[int, ...]) -> Tensor:
    out = torch.empty(shape)
    tensors.read_into(TensorSlice(name, (0,) * len(shape), shape), out)
    return out


def tensors_of_transformers(folder: Path, family: str) -> dict[str, Tensor]:
    """Return the initial weights that transformers makes, by the names of its files."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = raw_family_config(family, initializer_range=STD)
    settings = {key: value for key, value in raw.items() if key not in ("model_type", "architectures")}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(raw["model_type"], **settings)).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_every_tensor_has_the_distribution_that_transformers_gives_it(tmp_path: Path, family: str) -> None:
    spec = spec_of(tmp_path, family)
    assert spec.initializer_range == STD
    tensors, expected = RandomTensors(spec, seed=0), tensors_of_transformers(tmp_path / "model", family)
    seen = set()
    for name, shape in hf_shapes(spec).items():
        values, wanted = whole(tensors, name, shape), expected[name].float()
        assert wanted.shape == shape
        if wanted.unique().numel() == 1:
            assert values.unique().tolist() == wanted.unique().tolist(), name
            continue
        seen.add(name)
        error = STD / values.numel() ** 0.5
        assert abs(values.mean()) < 5 * error, name
        assert abs(values.std() - STD) < 5 * error, name
        assert values.unique().numel() > 0.9 * values.numel(), name
    assert len(seen) > 10


def test_a_slice_has_the_values_of_the_whole_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows: the slices begin and end inside of blocks."""
    spec = spec_of(tmp_path, "gpt_oss")
    for name, row in (("model.embed_tokens.weight", 64), ("model.layers.0.mlp.experts.gate_up_proj", 64 * 192)):
        shape = hf_shapes(spec)[name]
        monkeypatch.setattr(random_tensors, "_BLOCK_ELEMENTS", 3 * row)
        tensors = RandomTensors(spec, seed=3)
        full = whole(tensors, name, shape)
        for begin in range(shape[0]):
            for end in range(begin + 1, shape[0] + 1):
                rest = tuple(size - 2 for size in shape[1:])
                box = TensorSlice(name, (begin, *(1 for _ in rest)), (end - begin, *rest))
                out = torch.empty(box.shape)
                tensors.read_into(box, out)
                assert torch.equal(out, full[box.index]), (name, begin, end)


def test_values_differ_between_tensors_rows_and_seeds(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "llama")
    first, second = RandomTensors(spec, seed=0), RandomTensors(spec, seed=1)
    name, other = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    shape = hf_shapes(spec)[name]
    values = whole(first, name, shape)
    assert torch.equal(values, whole(RandomTensors(spec, seed=0), name, shape))
    assert not torch.equal(values, whole(second, name, shape))
    assert not torch.equal(values, whole(first, other, shape))
    assert values[0].ne(values[1]).any()
